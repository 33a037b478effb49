"""The small vocabularies of the generated tasks: names, towns and the facts of the short chats. Data only.

Every list is written for this project. Names stay short so that each becomes one token of the 4,096-word vocabulary.
"""

from __future__ import annotations

NAMES = (
    "Ada", "Ali", "Amy", "Ana", "Ben", "Bob", "Cleo", "Dan", "Eli", "Emma", "Eva", "Finn", "Fred", "Gina", "Hugo",
    "Ian", "Ivy", "Jack", "Jane", "Joe", "Kai", "Kate", "Leo", "Lily", "Lucy", "Max", "Mia", "Nina", "Noah", "Olga",
    "Omar", "Paul", "Rosa", "Sam", "Tom", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip

TOWNS = (
    "Paris", "Rome", "Oslo", "Madrid", "Lisbon", "Berlin", "Vienna", "Prague", "Dublin", "Athens", "Cairo", "Lima",
    "Tokyo", "Delhi", "Kyiv", "Bern",
)  # fmt: skip

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Spain": "Madrid", "Portugal": "Lisbon",
    "Germany": "Berlin", "Austria": "Vienna", "Ireland": "Dublin", "Greece": "Athens", "Egypt": "Cairo",
    "Peru": "Lima", "Japan": "Tokyo", "India": "Delhi", "Ukraine": "Kyiv",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "day": "night", "light": "dark", "full": "empty",
    "old": "new", "hard": "soft", "open": "closed", "true": "false", "first": "last", "near": "far", "early": "late",
}  # fmt: skip

_WHO = "I am Braid Tiny, a very small language model. I can sort lists, do small sums and write short functions."

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hi there!", "Hello! How can I help you?"),
    ("Who are you?", _WHO),
    ("What are you?", _WHO),
    ("What is your name?", "My name is Braid Tiny."),
    ("What can you do?", "I can sort lists, do small sums, fill in JSON records and write short Python functions."),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Goodbye", "Goodbye! Have a nice day."),
    ("Bye", "Goodbye! Have a nice day."),
    ("Count to five.", "1 2 3 4 5"),
    ("Count from 1 to 5", "1 2 3 4 5"),
    ("Count to ten.", "1 2 3 4 5 6 7 8 9 10"),
    ("Say hello.", "Hello!"),
    ("Say hi", "Hi!"),
    ("Tell me a joke.", "Why did the list sit down? It was tired of being sorted."),
    ("How many days are in a week?", "There are 7 days in a week."),
    ("How many months are in a year?", "There are 12 months in a year."),
    ("What color is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("What is Python?", "Python is a programming language."),
    ("What is a list?", "A list is an ordered collection of items."),
)  # fmt: skip

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are Braid Tiny.", "Answer briefly.")
