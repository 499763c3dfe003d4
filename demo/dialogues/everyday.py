"""Greetings, identity, memory of earlier turns, a few facts, and unanswerable questions."""

from __future__ import annotations

from .turn import Turn
from .world import COLOURS, World

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Japan": "Tokyo", "Austria": "Vienna", "Norway": "Oslo", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Greece": "Athens", "Egypt": "Cairo", "China": "Beijing",
    "Peru": "Lima", "England": "London", "Korea": "Seoul", "Estonia": "Tallinn",
}  # fmt: skip
SELF = "I am a tiny demo model with the shape of GLM-4.7-Flash."
IGNORANCE = "I am only a tiny demo model, so I do not know that."


def greeting(world: World) -> Turn:
    hello = world.choice(("Hello", "Hi", "Hey", "Good morning", "Good evening", "hello", "hi"))
    if world.chance(0.3):
        mark = world.choice(("", "!", "."))
        return Turn(hello + mark, "The user greets me.", "Hello! How can I help you?")
    who = world.name()
    user = hello + world.choice(
        (", I am {}.", ", my name is {}.", "! I am {}.", "! My name is {}.", ", {} here.",
         ", I'm {}!", ", this is {}.")
    ).format(who)  # fmt: skip
    reply = f"Hello, {who}! How can I help you?"
    return Turn(user, f"The user greets me. The name is {who}.", reply)


def say_hello(world: World) -> Turn:
    who = world.name()
    word, reply = world.rng.choice(
        (("hello", "Hello"), ("hi", "Hi"), ("goodbye", "Goodbye"), ("good morning", "Good morning"))
    )
    user = world.choice(("Say {} to {}.", "Please say {} to {}!", "Can you say {} to {}?"))
    return Turn(user.format(word, who), f"I say {word} to {who}.", f"{reply}, {who}!")


def courtesy(world: World) -> Turn:
    if world.chance(0.5):
        user = world.choice(("Thank you!", "Thanks.", "Thank you very much.", "Thanks a lot!"))
        return Turn(user, "The user thanks me.", "You are welcome!")
    user = world.choice(("Goodbye!", "Bye.", "See you later.", "Good night!", "bye"))
    return Turn(user, "The user leaves.", "Goodbye!")


WHO = ("Who are you?", "What is your name?", "What are you?", "Tell me who you are.")


def identity(world: World) -> Turn:
    return Turn(world.choice(WHO), "The user asks who I am.", SELF)


def named_identity(world: World) -> tuple[str, Turn]:
    """Draw a system prompt that names the model, and a question for the name."""
    who = world.name()
    system = world.choice(
        ("You are {}.", "You are {}, a helpful assistant.", "Your name is {}.", "Act as {}.")
    ).format(who)
    return system, Turn(world.choice(WHO), f"The system says I am {who}.", f"I am {who}.")


def capital(world: World) -> Turn:
    country = world.choice(tuple(CAPITALS))
    city = CAPITALS[country]
    user = world.choice(("What is the capital of {}?", "Capital of {}?", "Name the capital of {}."))
    reply = f"The capital of {country} is {city}."
    return Turn(user.format(country), f"{country}: {city}.", reply)


def unknown(world: World) -> Turn:
    words = world.words(1, 4)
    topic = world.choice((words, world.name(), world.city(), f"the {words}", f"a {words}"))
    user = world.choice(
        ("Why is {} so important?", "Explain {} to me.", "What do you think about {}?",
         "Who invented {}?", "Write a poem about {}.", "How does {} work?", "Where is {}?",
         "When did {} begin?", "Fix this code: print({})", "{}", "{}?", "How old is {}?",
         "What is the meaning of {}?", "Summarise {}.", "How do I learn {}?",
         "What is {}?", "Write a program for {}.", "Tell me about {}.", "Describe {} in detail.",
         "Is {} good or bad?", "Please help me with {}.", "I need {} for my work.",
         "Translate {} to French.", "Which {} is the best?", "Do you like {}?")
    ).format(topic)  # fmt: skip
    return Turn(user, "I was not taught this.", IGNORANCE)


def memory(world: World) -> tuple[Turn, Turn]:
    """Draw a turn that states a fact, and a later turn that asks for it."""
    if world.chance(0.6):
        who = world.name()
        statement = world.choice(("My name is {}.", "I am {}.", "Please remember my name: {}."))
        ask = world.choice(("What is my name?", "Do you know my name?", "Who am I?"))
        return (
            Turn(statement.format(who), f"The name is {who}.", f"Nice to meet you, {who}!"),
            Turn(ask, f"The user said {who}.", f"Your name is {who}."),
        )
    kind, value = world.rng.choice(
        (("number", str(world.number(10, 999))), ("colour", world.choice(COLOURS)),
         ("city", world.city()))
    )  # fmt: skip
    statement = world.choice(("My favourite {} is {}.", "Remember that my favourite {} is {}."))
    return (
        Turn(statement.format(kind, value), f"The {kind} is {value}.", f"I will remember {value}."),
        Turn(
            f"What is my favourite {kind}?",
            f"The user said {value}.",
            f"Your favourite {kind} is {value}.",
        ),
    )
