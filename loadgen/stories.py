"""Scripted conversations whose last question asks for something said before the agent slept.

They are short and plain because the demo's model is small, with 135 million parameters; what it
answers is printed as it is.
"""

from __future__ import annotations

import msgspec


class Turn(msgspec.Struct, frozen=True):
    """One turn of a conversation.

    Attributes:
        role: ``"system"``, ``"user"`` or another that the model's chat template knows.
        content: What is said.
    """

    role: str
    content: str


class Act(msgspec.Struct, frozen=True):
    """A tool call and what is said after it.

    Attributes:
        tool: The tool's name.
        turns: The tool's result and the question that follows.
    """

    tool: str
    turns: tuple[Turn, ...]


class Story(msgspec.Struct, frozen=True):
    """One agent's part.

    Attributes:
        fact: What the model has to remember, as it should appear in an answer.
        opening: The first request.
        acts: The tool calls; an agent with more iterations begins again with the first.
    """

    fact: str
    opening: tuple[Turn, ...]
    acts: tuple[Act, ...]


_SYSTEM = "You are a helpful assistant. Answer in one short sentence."


def _story(fact: str, opening: str, tool: str, result: str, question: str) -> Story:
    return Story(
        fact,
        (Turn("system", _SYSTEM), Turn("user", opening)),
        (Act(tool, (Turn("user", f"{result} {question}"),)),),
    )


STORIES: tuple[Story, ...] = (
    _story(
        "Max",
        "My dog is called Max. What is my dog called?",
        "search",
        "The search tool found three parks nearby.",
        "What is my dog called?",
    ),
    _story(
        "tiger",
        "The secret word is tiger. What is the secret word?",
        "clock",
        "The clock tool says that it is noon.",
        "What is the secret word?",
    ),
    _story(
        "Berlin",
        "My office is in Berlin. Where is my office?",
        "calendar",
        "The calendar tool says that there are no meetings today.",
        "Where is my office?",
    ),
    _story(
        "Emma",
        "My sister is called Emma. What is the name of my sister?",
        "phone",
        "The phone tool says that nobody answers.",
        "What is the name of my sister?",
    ),
    _story(
        "pizza",
        "We will eat pizza tonight. What will we eat tonight?",
        "shop",
        "The shop tool says that tomatoes cost one euro.",
        "What will we eat tonight?",
    ),
    _story(
        "Monday",
        "The exam is on Monday. On which day is the exam?",
        "mail",
        "The mail tool says that there are two new messages.",
        "On which day is the exam?",
    ),
    _story(
        "banana",
        "The password of the door is banana. What is the password of the door?",
        "clock",
        "The clock tool says that it is noon.",
        "What is the password of the door?",
    ),
    _story(
        "Luna",
        "My cat is called Luna. What is my cat called?",
        "weather",
        "The weather tool says that it is sunny and 21 degrees.",
        "What is my cat called?",
    ),
    _story(
        "rose",
        "The secret word is rose. What is the secret word?",
        "search",
        "The search tool found three shops nearby.",
        "What is the secret word?",
    ),
    _story(
        "Oscar",
        "My brother is called Oscar. What is the name of my brother?",
        "phone",
        "The phone tool says that nobody answers.",
        "What is the name of my brother?",
    ),
)
