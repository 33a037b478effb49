"""Short Python functions, written for this project, and their variations: the part of the data that teaches code.

`SOURCE` is plain Python text, one function after another; `draw_function` renames the function and its arguments, and
keeps or drops the docstring, so that `def fibonacci(n):` and `def fib(num):` both complete. Nothing here is executed.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence

from server.embedded.tasks import IM_END, Example, chat_prompt

SOURCE = '''
def fibonacci(n):
    """Return the nth Fibonacci number."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

def fibonacci_list(n):
    """Return the first n Fibonacci numbers."""
    result = []
    a, b = 0, 1
    for _ in range(n):
        result.append(a)
        a, b = b, a + b
    return result

def factorial(n):
    """Return the factorial of n."""
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result

def is_prime(n):
    """Return True if n is a prime number."""
    if n < 2:
        return False
    for i in range(2, int(n ** 0.5) + 1):
        if n % i == 0:
            return False
    return True

def primes_up_to(n):
    """Return all primes up to n."""
    result = []
    for i in range(2, n + 1):
        if all(i % p != 0 for p in result):
            result.append(i)
    return result

def gcd(a, b):
    """Return the greatest common divisor of a and b."""
    while b:
        a, b = b, a % b
    return a

def lcm(a, b):
    """Return the least common multiple of a and b."""
    return a * b // gcd(a, b)

def power(base, exponent):
    """Return base raised to exponent."""
    result = 1
    for _ in range(exponent):
        result *= base
    return result

def reverse_string(text):
    """Return the text reversed."""
    return text[::-1]

def is_palindrome(text):
    """Return True if the text reads the same backwards."""
    return text == text[::-1]

def count_vowels(text):
    """Return the number of vowels in the text."""
    return sum(1 for char in text.lower() if char in "aeiou")

def count_words(text):
    """Return the number of words in the text."""
    return len(text.split())

def word_frequencies(text):
    """Count how often each word occurs."""
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts

def char_count(text):
    """Count how often each character occurs."""
    counts = {}
    for char in text:
        counts[char] = counts.get(char, 0) + 1
    return counts

def capitalize_words(text):
    """Capitalize every word of the text."""
    return " ".join(word.capitalize() for word in text.split())

def remove_spaces(text):
    """Return the text without spaces."""
    return text.replace(" ", "")

def is_anagram(first, second):
    """Return True if both texts have the same letters."""
    return sorted(first) == sorted(second)

def caesar_cipher(text, shift):
    """Shift every letter of the text."""
    result = ""
    for char in text:
        if char.isalpha():
            start = ord("a") if char.islower() else ord("A")
            result += chr((ord(char) - start + shift) % 26 + start)
        else:
            result += char
    return result

def binary_search(items, target):
    """Return the index of target in the sorted items, or -1."""
    low, high = 0, len(items) - 1
    while low <= high:
        mid = (low + high) // 2
        if items[mid] == target:
            return mid
        if items[mid] < target:
            low = mid + 1
        else:
            high = mid - 1
    return -1

def linear_search(items, target):
    """Return the index of target, or -1."""
    for i, item in enumerate(items):
        if item == target:
            return i
    return -1

def bubble_sort(items):
    """Sort the items in place."""
    for i in range(len(items)):
        for j in range(len(items) - 1 - i):
            if items[j] > items[j + 1]:
                items[j], items[j + 1] = items[j + 1], items[j]
    return items

def insertion_sort(items):
    """Sort the items in place."""
    for i in range(1, len(items)):
        j = i
        while j > 0 and items[j - 1] > items[j]:
            items[j - 1], items[j] = items[j], items[j - 1]
            j -= 1
    return items

def quick_sort(items):
    """Return the items in ascending order."""
    if len(items) <= 1:
        return items
    pivot = items[0]
    left = [x for x in items[1:] if x < pivot]
    right = [x for x in items[1:] if x >= pivot]
    return quick_sort(left) + [pivot] + quick_sort(right)

def merge_sort(items):
    """Return the items in ascending order."""
    if len(items) <= 1:
        return items
    mid = len(items) // 2
    return merge(merge_sort(items[:mid]), merge_sort(items[mid:]))

def merge(left, right):
    """Merge two sorted lists."""
    result = []
    while left and right:
        if left[0] <= right[0]:
            result.append(left.pop(0))
        else:
            result.append(right.pop(0))
    return result + left + right

def sum_list(items):
    """Return the sum of the items."""
    total = 0
    for item in items:
        total += item
    return total

def average(items):
    """Return the mean of the items."""
    return sum(items) / len(items)

def median(items):
    """Return the middle value of the items."""
    ordered = sorted(items)
    mid = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[mid]
    return (ordered[mid - 1] + ordered[mid]) / 2

def find_max(items):
    """Return the largest item."""
    largest = items[0]
    for item in items:
        if item > largest:
            largest = item
    return largest

def find_min(items):
    """Return the smallest item."""
    smallest = items[0]
    for item in items:
        if item < smallest:
            smallest = item
    return smallest

def remove_duplicates(items):
    """Return the items without duplicates, in order."""
    result = []
    for item in items:
        if item not in result:
            result.append(item)
    return result

def flatten(items):
    """Flatten a list of lists."""
    return [x for inner in items for x in inner]

def chunk(items, size):
    """Split the items into chunks of the given size."""
    return [items[i:i + size] for i in range(0, len(items), size)]

def rotate(items, k):
    """Rotate the items to the left by k."""
    k = k % len(items)
    return items[k:] + items[:k]

def reverse_list(items):
    """Return the items in reverse order."""
    return items[::-1]

def is_sorted(items):
    """Return True if the items are in ascending order."""
    return all(items[i] <= items[i + 1] for i in range(len(items) - 1))

def cumulative_sum(items):
    """Return the running totals of the items."""
    total = 0
    result = []
    for item in items:
        total += item
        result.append(total)
    return result

def dot_product(first, second):
    """Return the dot product of two vectors."""
    return sum(x * y for x, y in zip(first, second))

def transpose(matrix):
    """Return the transposed matrix."""
    return [list(row) for row in zip(*matrix)]

def is_even(n):
    """Return True if n is even."""
    return n % 2 == 0

def is_odd(n):
    """Return True if n is odd."""
    return n % 2 == 1

def square(n):
    """Return the square of n."""
    return n * n

def cube(n):
    """Return the cube of n."""
    return n * n * n

def add(a, b):
    """Return the sum of a and b."""
    return a + b

def subtract(a, b):
    """Return the difference of a and b."""
    return a - b

def multiply(a, b):
    """Return the product of a and b."""
    return a * b

def divide(a, b):
    """Return a divided by b."""
    if b == 0:
        raise ValueError("cannot divide by zero")
    return a / b

def maximum(a, b):
    """Return the larger of a and b."""
    return a if a > b else b

def absolute(n):
    """Return the absolute value of n."""
    return -n if n < 0 else n

def clamp(value, low, high):
    """Limit the value to the range from low to high."""
    return max(low, min(value, high))

def sum_digits(n):
    """Return the sum of the digits of n."""
    return sum(int(digit) for digit in str(n))

def is_leap_year(year):
    """Return True if the year is a leap year."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)

def fizzbuzz(n):
    """Print the numbers from 1 to n in the FizzBuzz game."""
    for i in range(1, n + 1):
        if i % 15 == 0:
            print("FizzBuzz")
        elif i % 3 == 0:
            print("Fizz")
        elif i % 5 == 0:
            print("Buzz")
        else:
            print(i)

def collatz(n):
    """Return the Collatz sequence that starts at n."""
    result = [n]
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        result.append(n)
    return result

def divisors(n):
    """Return all divisors of n."""
    return [i for i in range(1, n + 1) if n % i == 0]

def celsius_to_fahrenheit(celsius):
    """Convert degrees Celsius to Fahrenheit."""
    return celsius * 9 / 5 + 32

def fahrenheit_to_celsius(fahrenheit):
    """Convert degrees Fahrenheit to Celsius."""
    return (fahrenheit - 32) * 5 / 9

def to_binary(n):
    """Return n in binary digits."""
    return bin(n)[2:]

def read_lines(path):
    """Return the lines of a file."""
    with open(path) as file:
        return file.read().splitlines()

def hello(name):
    """Greet the person."""
    print("Hello, " + name + "!")

def hello_world():
    """Print a greeting."""
    print("Hello, world!")
'''

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "fibonacci": ("fib",), "factorial": ("fact",), "gcd": ("greatest_common_divisor",), "reverse_string": ("reverse",),
    "is_prime": ("prime",), "quick_sort": ("quicksort",), "merge_sort": ("mergesort",), "average": ("mean",),
    "find_max": ("max_value",), "find_min": ("min_value",), "remove_duplicates": ("unique",), "power": ("pow",),
    "is_palindrome": ("palindrome",), "sum_list": ("total",), "hello": ("greet",), "absolute": ("abs_value",),
}  # fmt: skip

OTHER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "n": ("number", "num", "x"), "items": ("numbers", "values", "lst", "arr"), "text": ("s", "string"),
    "target": ("value", "key"), "a": ("x",), "b": ("y",), "first": ("a",), "second": ("b",),
}  # fmt: skip

PLAIN_SHARE = 0.6
"""Share of draws that keep the names as they stand in `SOURCE`: what a person is most likely to type."""


def parse_functions(source: str = SOURCE) -> dict[str, str]:
    """The text of each function of `source`, by name, each ending in one newline. Raises SyntaxError."""
    tree = ast.parse(source)
    texts = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            texts[node.name] = (ast.get_source_segment(source, node) or "") + "\n"
    return texts


def _rename(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


def _arguments(text: str) -> list[str]:
    inside = text[text.index("(") + 1 : text.index(")")]
    return [name.strip() for name in inside.split(",") if name.strip()]


def vary(text: str, rng: random.Random) -> str:
    """One variation of a function: names (kept in `PLAIN_SHARE` of the draws), then the docstring kept or dropped."""
    name = text[len("def ") : text.index("(")]
    if rng.random() > PLAIN_SHARE:
        text = _rename(text, name, rng.choice((name, *OTHER_NAMES.get(name, ()))))
        for argument in _arguments(text):
            new = rng.choice((argument, *OTHER_ARGUMENTS.get(argument, ())))
            if not re.search(rf"\b{new}\b", text):
                text = _rename(text, argument, new)
    if rng.random() < 0.7:
        text = re.sub(r'    """.*?"""\n', "", text)
    return text


def draw_function(texts: Sequence[str], rng: random.Random) -> Example:
    """A function as an example: usually the `def` line (or less of it) as the prompt, sometimes asked for in a chat."""
    text = vary(rng.choice(texts), rng)
    head, body = text.split("\n", 1)
    draw = rng.random()
    if draw < 0.6:
        return Example("function", head, f"\n{body}")
    if draw < 0.75:
        return Example("function", f"{head}\n", body)
    if draw < 0.9:
        name = head[: head.index("(")]
        return Example("function", name, f"{text.removeprefix(name)}")
    wanted = head[len("def ") : head.index("(")].replace("_", " ")
    return Example("function", chat_prompt(f"Write a Python function: {wanted}"), f"{text.rstrip()}{IM_END}")
