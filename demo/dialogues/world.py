"""Names, words and numbers of the dialogues, split into training and held-out values.

The checksum of a value decides whether it is held out. Training never draws a held-out value, and
evaluation draws only held-out values; both sets are unlimited.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 10
"""One of this many values is held out."""

SYLLABLES = tuple(
    """ka vi ra to mel no sa lin da ber ti go fen lu ari mo za pe ril ena ru dor bel ni sha ko
    lar vo tes mi han que li jo wen cy ron ad elo pha bri sto gan tu""".split()
)
FIRST_NAMES = tuple(
    """Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Karl Lena Mia Noah Olga Paul Rosa
    Sam Tina Uma Vera Walter Yara Zoe Alice Bob Carol Dan Eve Frank Maria Peter Laura John Mary
    Tom Lisa James Nina Oscar""".split()
)
CITIES = tuple(
    """Paris London Berlin Rome Madrid Tokyo Vienna Oslo Lisbon Dublin Athens Prague Cairo
    Boston Chicago Beijing Delhi Lima Sydney Toronto Munich Hamburg Lyon Milan Seoul Shanghai
    Tallinn Zurich Geneva Denver""".split()
)
CITY_ENDINGS = ("ville", "burg", "ton", "ford", "dale", "port")
WORDS = tuple(
    """apple river stone green little morning window garden silver mountain paper bridge yellow
    summer winter coffee table music orange forest candle button purple dragon rocket island
    basket feather hammer pencil planet rabbit shadow ticket tunnel velvet wagon anchor blanket
    castle desert engine flower ginger harbor jacket kitten ladder magnet needle ocean pepper
    quiet round simple tiger umbrella village whisper copper bright gentle heavy lucky narrow
    open proud quick rapid sweet tiny warm young blue red white black cold dark early fast
    happy kind late long new old rich short small soft strong tall wide wild wise bird boat
    book cake cat cloud dog door fish fox hat house key lamp leaf milk moon nut owl pear pie
    rain ring road rose sand ship shoe snow song star sun tea train tree wave wind wolf
    cheese bread honey lemon melon salad sugar tomato""".split()
)
ANIMALS = ("fox", "cat", "dog", "owl", "tiger", "rabbit", "wolf", "bird", "horse", "bear")
ROOMS = ("kitchen", "bedroom", "office", "garage", "hallway", "bathroom", "cellar", "attic")
FOODS = ("milk", "bread", "honey", "cheese", "sugar", "tea", "coffee", "salad", "pepper", "cake")
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowy")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black", "silver")
JOBS = ("baker", "doctor", "farmer", "pilot", "painter", "teacher", "singer", "driver")


def held_out(value: str) -> bool:
    """Return whether `value` is held out from training."""
    return zlib.crc32(value.encode()) % HELD_OUT_SHARE == 0


@dataclass
class World:
    """Random values for a dialogue: training values, or held-out ones for evaluation."""

    rng: random.Random
    evaluation: bool

    def drawn(self, draw: Callable[[], str]) -> str:
        """Call `draw` until its value is on this world's side of the split."""
        while True:
            value = draw()
            if held_out(value) == self.evaluation:
                return value

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def name(self) -> str:
        """Draw a person's name, invented in three of four cases."""
        if self.chance(0.25):
            return self.drawn(lambda: self.rng.choice(FIRST_NAMES))
        return self.drawn(lambda: self.syllables(2, 3).capitalize())

    def city(self) -> str:
        if self.chance(0.35):
            return self.drawn(lambda: self.rng.choice(CITIES))
        return self.drawn(self.invented_city)

    def invented_city(self) -> str:
        return (self.syllables(1, 2) + self.choice(CITY_ENDINGS)).capitalize()

    def syllables(self, least: int, most: int) -> str:
        return "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(least, most)))

    def words(self, least: int, most: int) -> str:
        """Draw distinct common words, joined by spaces. The combination is held out or not."""
        count = self.rng.randint(least, most)
        return self.drawn(lambda: " ".join(self.rng.sample(WORDS, count)))

    def number(self, least: int, most: int) -> int:
        return self.rng.randint(least, most)

    def choice(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)
