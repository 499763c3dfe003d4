"""Paragraphs in six natural languages, written for the corpus, with drawn names and numbers."""

from __future__ import annotations

import random

from corpus_code import Source

NAMES = (
    "Amara", "Jonas", "Lucía", "Mei", "Tomasz", "Ines", "Yusuf", "Clara", "Henrik", "Paola",
    "Ravi", "Noor", "Elif", "Mateo", "Sofia", "Kenji",
)  # fmt: skip
PLACES = (
    "Rotterdam", "Trieste", "Lyon", "Valencia", "Leipzig", "Porto", "Bergen", "Kraków", "Genova",
    "Graz", "Nantes", "Sevilla", "Dundee", "Suzhou",
)  # fmt: skip

PARAGRAPHS: dict[str, tuple[str, ...]] = {
    "english": (
        "When @{name} moved to @{place}, the first thing she noticed was the harbour bell. It rang"
        " every @{n} minutes, whether or not a ship was due, and nobody could say who had ordered"
        " it. After @{m} days she stopped hearing it, and on the day it fell silent she woke at"
        " once and went to the window.",
        "A sourdough starter is only flour, water and patience. Mix @{n} grams of each, leave the"
        " jar near a radiator and feed it daily. By the end of the first week it should double in"
        " less than @{k} hours. If it smells of paint, it is hungry; throw half of it away and"
        " feed it again.",
        "The committee met in @{place} for @{k} days and agreed on almost nothing. Farmers wanted"
        " the water released in May, the power company in August, and the town, which had been"
        " flooded @{k} times, not at all. @{name}, who kept the minutes, later wrote that the only"
        " decision taken unanimously was to meet again.",
        "Bees do not see red, but they see ultraviolet, and many flowers that look plain to us"
        " carry bright patterns for them. In an experiment with @{m} artificial flowers, foragers"
        " learned within @{n} visits which pattern promised sugar. They remembered it the next"
        " morning, and some of them the next week.",
        "Dear @{name}, thank you for your letter of the @{k}th. I am sorry that the parcel reached"
        " you late and damaged. We have sent a replacement from @{place} today, and you need not"
        " return the broken lamp. If it has not arrived within @{n} hours, please call me directly"
        " and mention order @{m}.",
        "The old road climbs @{m} metres in @{k} kilometres, then runs level along the ridge."
        " Cyclists curse the first part and forget it on the second. From the chapel you can see"
        " the coast on clear days, and a sign, repainted by @{name} each spring, asks visitors to"
        " close the gate because of the goats.",
        "Interest compounds quietly. Somebody who saves @{n} a month from the age of twenty will"
        " often have more at sixty than somebody who saves twice as much from the age of forty."
        " What matters is less the rate than the years, which is exactly the part that cannot be"
        " bought back, as @{name} explained to a room of bored apprentices in @{place}.",
        "Before printing, the type was set letter by letter, upside down and from left to right. A"
        " good compositor in @{place} managed @{m} lines a day, and could find a wrong letter by"
        " touch. @{name} kept the cases in an order of her own, to the despair of everyone who had"
        " to take over from her.",
    ),
    "german": (
        "Als @{name} nach @{place} zog, fiel ihr zuerst auf, wie spät die Läden öffneten. Vor zehn"
        " Uhr war kaum ein Mensch auf der Straße, dafür brannte um Mitternacht noch in jedem"
        " zweiten Fenster Licht. Nach @{n} Tagen hatte sie sich daran gewöhnt, nach @{m} Tagen"
        " wunderte sie sich über alle anderen Städte.",
        "Für den Teig verknetet man @{m} Gramm Mehl mit einem Ei, etwas Salz und so viel Wasser,"
        " dass er nicht mehr klebt. Danach muss er mindestens @{n} Minuten ruhen. Wer ungeduldig"
        " ist, merkt es beim Ausrollen: Der Teig zieht sich zusammen, und die Maultaschen platzen"
        " im heißen Wasser auf.",
        "Der Gemeinderat von @{place} hat am Dienstagabend beschlossen, die Brücke für den"
        " Autoverkehr zu sperren. Ein Gutachten hatte gezeigt, dass @{k} der tragenden Seile"
        " beschädigt sind. Die Reparatur soll @{n} Wochen dauern und wird teurer als geplant."
        " @{name}, die Bürgermeisterin, sprach von einer Entscheidung ohne Alternative.",
        "Schwalben kehren fast immer an den Ort zurück, an dem sie geschlüpft sind. Unter"
        " @{m} beringten Vögeln fanden die Forscherinnen nur @{k}, die sich ein anderes Dorf"
        " gesucht hatten. Warum sie das taten, ist ungeklärt; vermutlich fehlte es am feuchten"
        " Lehm, aus dem sie ihre Nester bauen.",
        "Sehr geehrte Frau @{name}, vielen Dank für Ihre Nachricht. Die Heizung wurde am @{k}."
        " geprüft, ein Fehler ließ sich dabei nicht feststellen. Sollte die Temperatur erneut"
        " unter @{n} Grad fallen, rufen Sie bitte sofort an, damit wir den Techniker aus @{place}"
        " noch am selben Tag schicken können.",
        "Wer zum ersten Mal ein Segelboot steuert, zieht meist in die falsche Richtung an der"
        " Pinne. Das ist nicht schlimm, solange genug Platz ist. @{name} lässt ihre Schüler"
        " deshalb @{n} Minuten lang nur Kreise fahren, bevor sie das Wort Wende überhaupt"
        " ausspricht, und kein Boot ist dabei je gekentert.",
    ),
    "french": (
        "Quand @{name} est arrivée à @{place}, il pleuvait depuis @{k} jours et personne ne"
        " semblait s'en apercevoir. Les terrasses étaient pleines, les vélos passaient sans bruit"
        " sur les pavés, et la boulangère lui expliqua qu'il fallait attendre le vent d'ouest"
        " avant de songer à faire sécher quoi que ce soit.",
        "Pour réussir la soupe, faites revenir @{k} oignons très doucement, pendant au moins @{n}"
        " minutes. C'est long, mais c'est le secret : ils doivent devenir bruns sans brûler."
        " Mouillez ensuite avec le bouillon, salez peu, et ne servez qu'après avoir gratiné le"
        " pain et le fromage au four.",
        "Le conseil municipal de @{place} a voté hier la fermeture du marché couvert pour travaux."
        " Les @{m} commerçants seront relogés sous des tentes, au bord du canal. « Nous aurions"
        " préféré l'été », regrette @{name}, qui vend des fromages ici depuis @{n} ans et craint"
        " de perdre une partie de sa clientèle.",
        "On croit souvent que la lune influence la croissance des légumes. Une équipe a comparé"
        " @{m} semis, la moitié en lune montante, l'autre en lune descendante, sans trouver la"
        " moindre différence. Le jardinier, lui, n'a pas changé ses habitudes : le calendrier lui"
        " rappelle au moins de semer à temps.",
        "Chère @{name}, je vous écris de la petite gare de @{place}, où le train a pris @{n}"
        " minutes de retard. Cela me donne le temps de vous remercier pour votre accueil. Les"
        " enfants parlent encore du grenier, et surtout de la boîte aux @{m} boutons, dont ils"
        " voudraient connaître l'histoire.",
        "Apprendre une langue, ce n'est pas seulement retenir des mots ; c'est accepter de paraître"
        " un peu sot pendant des mois. Les adultes y renoncent plus vite que les enfants, non"
        " parce qu'ils oublient davantage, mais parce qu'ils ont plus à perdre. @{name} conseille"
        " de commencer par les plaisanteries.",
    ),
    "spanish": (
        "Cuando @{name} llegó a @{place}, lo primero que le sorprendió fue el silencio de la"
        " siesta. Entre las tres y las cinco no se oía más que el agua de la fuente. Tardó @{n}"
        " días en acostumbrarse y, cuando por fin lo hizo, ya no supo trabajar de otra manera.",
        "Para el gazpacho se trituran @{k} tomates maduros con pepino, pimiento, ajo y pan del día"
        " anterior. Hay que añadir el aceite poco a poco, como si fuera una mayonesa, y dejarlo en"
        " la nevera al menos @{n} minutos. Servido tibio pierde toda la gracia.",
        "El ayuntamiento de @{place} anunció ayer que plantará @{m} árboles antes del invierno. Los"
        " vecinos aplauden la medida, aunque recuerdan que de los plantados hace @{k} años apenas"
        " sobrevivió la mitad. «Sin riego no hay sombra», resume @{name}, que cuida por su cuenta"
        " los de su calle.",
        "Las tortugas marinas regresan a la playa donde nacieron guiadas por el campo magnético de"
        " la Tierra. En un seguimiento de @{m} ejemplares, solo @{k} se equivocaron de costa. La"
        " luz de los paseos marítimos las confunde más que cualquier tormenta, y por eso algunos"
        " pueblos apagan sus farolas en verano.",
        "Estimada @{name}: le escribo para confirmar la reserva de @{k} noches a partir del día"
        " @{k}. La habitación da al patio y es muy tranquila. Si llega a @{place} después de las"
        " once, encontrará la llave en el buzón; el código es @{m}. No dude en llamarme si necesita"
        " cualquier cosa.",
        "El ajedrez enseña a perder, decía mi abuelo, y por eso conviene empezar pronto. Jugábamos"
        " todas las tardes, con un reloj que se paraba cada @{n} minutos y un alfil sustituido por"
        " un botón. La primera vez que le gané, se levantó, me dio la mano y no volvió a dejarme"
        " ventaja.",
    ),
    "italian": (
        "Quando @{name} si trasferì a @{place}, pensava di restarci @{k} mesi. Affittò una stanza"
        " sopra l'officina di un liutaio e imparò a distinguere dal rumore il legno di abete da"
        " quello di acero. Dopo @{m} giorni, senza averlo deciso, aveva già smesso di cercare casa"
        " altrove.",
        "Il segreto del risotto è il brodo, che deve restare bollente per tutti i @{n} minuti della"
        " cottura. Si aggiunge un mestolo alla volta, mescolando con calma. Alla fine, lontano dal"
        " fuoco, si unisce il burro freddo: è in quel momento che il riso diventa cremoso, senza"
        " bisogno di panna.",
        "La giunta di @{place} ha approvato ieri il nuovo piano dei trasporti. Le corse serali"
        " passeranno da @{k} a @{n} e il biglietto costerà qualche centesimo in più. @{name},"
        " portavoce dei pendolari, si dice soddisfatta a metà: gli autobus ci sono, mancano gli"
        " autisti per guidarli.",
        "I faggi di una stessa valle fioriscono tutti insieme, ma non ogni anno. Secondo uno studio"
        " su @{m} alberi, il segnale è una primavera asciutta dopo un'estate calda. Così i semi"
        " sono troppi perché gli animali li mangino tutti, e qualcuno di loro, nel bosco, riesce a"
        " germogliare.",
        "Gentile @{name}, la ringrazio per la pazienza. Il volume ordinato è arrivato stamani"
        " da @{place}, con la copertina un poco segnata; se crede, posso farle uno sconto di @{k}"
        " euro oppure chiederne un'altra copia. La libreria resta aperta fino alle sette, tranne il"
        " lunedì.",
        "Mia nonna contava i punti della maglia in dialetto e tutto il resto in italiano. Se la si"
        " interrompeva, ricominciava dall'inizio senza arrabbiarsi. Per un maglione servivano @{m}"
        " gomitoli e un inverno intero, e nessuno di noi ha mai osato dirle che le maniche erano"
        " sempre troppo lunghe.",
    ),
    "chinese": (
        "@{name}搬到@{place}的第一天，就被窗外的钟声吵醒了。钟每隔@{n}分钟响一次，街坊们却好像从来听不见。"
        "过了大约@{m}天，她也不再注意那声音；直到有一天钟忽然停了，全城的人都走到窗前，互相询问发生了什么事。",
        "做红烧豆腐并不难：先把@{m}克豆腐切成方块，用小火煎到两面金黄，再放姜、葱和酱油，加半碗水焖@{n}分钟。"
        "关键在于不要急着翻动，否则豆腐容易碎。出锅前撒一点糖，味道会更加柔和。",
        "市政府昨天宣布，@{place}的老桥将关闭@{n}个星期进行维修。工程师检查后发现，有@{k}根钢索已经生锈。"
        "附近的店主担心客人减少，不过@{name}认为，安全比生意重要，而且步行的人也许会更愿意停下来看一看橱窗。",
        "候鸟依靠星星和地球的磁场辨别方向。研究人员给@{m}只小鸟戴上了脚环，第二年春天，只有@{k}只没有回到原来的村庄。"
        "它们为什么离开，目前还没有定论，可能是因为河边用来筑巢的泥土越来越少。",
        "@{name}女士：您好！您订购的书已经从@{place}寄出，预计@{k}天之内可以送到。如果包装有破损，请当面拒收，"
        "并拨打我们的电话，说明订单号@{m}。给您带来的不便，我们深表歉意，随信附上一张@{n}元的优惠券。",
        "学习一门新的语言，最难的不是记住单词，而是愿意在很长的时间里显得有一点笨。孩子不怕出错，所以进步很快；"
        "成年人常常等到有把握的时候才开口，结果反而更慢。每天说@{n}分钟，比周末说@{k}个小时更有用。",
    ),
}


def prose(rng: random.Random, language: str, *, calibration: bool) -> str:
    """Two or three paragraphs; calibration and test samples share none."""
    paragraphs = PARAGRAPHS[language]
    held = max(2, len(paragraphs) // 3)
    pool = paragraphs[:held] if calibration else paragraphs[held:]
    chosen = rng.sample(pool, min(len(pool), rng.randint(2, 3)))
    gap = "\n\n" if rng.random() < 0.7 else "\n"
    return gap.join(
        Source(text).substitute(
            name=rng.choice(NAMES), place=rng.choice(PLACES), k=rng.randint(3, 9),
            n=rng.randint(2, 9) * 5, m=rng.randint(11, 96) * 10,
        )
        for text in chosen
    )  # fmt: skip
