"""The selector language: text → tree, canonical form, id, and a test for labels.

    selector   = [ or ]                          an empty selector selects everything
    or         = and { "||" and }
    and        = operation { "&&" operation }
    operation  = { "!" } ( "(" or ")" | "all()" | "global()" | "has(" label ")" | comparison )
    comparison = label ( "==" | "!=" | "contains" | "starts with" | "ends with" ) string
               | label ( "in" | "not in" ) "{" [ string { "," string } [ "," ] ] "}"

A label is up to 512 of ``[A-Za-z0-9_./-]``; a string stands in single or double quotes and
knows no escapes; only space and tab may stand between the words. ``!=`` and ``not in`` hold
for objects that lack the label; no other comparison does. ``all()`` and ``global()`` are
both simply true here: what they mean in a ``namespaceSelector`` is ``policy.effective``'s.

Canonical form and id are those of Calico, so that sets can be compared across clusters.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MAX_LABEL_LENGTH = 512
MAX_DEPTH = 100  # of parentheses; keeps everything recursive far from Python's stack limit

Labels = Mapping[str, str]


class SelectorError(ValueError):
    """A selector that can't be parsed. ``position`` counts characters from 0."""

    def __init__(self, text: str, position: int, expected: str) -> None:
        self.text = text
        self.position = position
        self.expected = expected
        shown = text if len(text) <= 200 else text[:200] + "…"
        found = repr(text[position : position + 20]) if position < len(text) else "the end"
        super().__init__(f"selector {shown!r}: at character {position}, {found}: {expected}")


@dataclass(frozen=True, slots=True)
class Everything:
    """``all()`` or ``global()``: always true."""

    name: str


@dataclass(frozen=True, slots=True)
class Has:
    """``has(label)``."""

    label: str


@dataclass(frozen=True, slots=True)
class Compare:
    """``label operator "value"``; operator ==, !=, contains, starts with, ends with."""

    label: str
    operator: str
    value: str


@dataclass(frozen=True, slots=True)
class Membership:
    """``label in {…}`` or ``label not in {…}``; values sorted, each once."""

    label: str
    operator: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """``!operand``."""

    operand: Node


@dataclass(frozen=True, slots=True)
class And:
    """All of two or more operands."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Any of two or more operands."""

    operands: tuple[Node, ...]


Node = Everything | Has | Compare | Membership | Not | And | Or


class Selector:
    """A parsed selector. Equal, and hashed, by canonical form.

    ``matches(labels)`` says whether an object with these labels is selected.
    ``id`` is ``s:`` and the unpadded base64url SHA-224 of ``s:`` + canonical form.
    """

    __slots__ = ("canonical", "id", "matches", "root")

    matches: Callable[[Labels], bool]

    def __init__(self, root: Node) -> None:
        self.root = root
        self.canonical = _canonical(root)
        self.id = unique_id("s", self.canonical)
        self.matches = _predicate(root)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selector) and other.canonical == self.canonical

    def __hash__(self) -> int:
        return hash(self.canonical)

    def __str__(self) -> str:
        return self.canonical

    def __repr__(self) -> str:
        return f"Selector({self.canonical!r})"


def parse(text: str) -> Selector:
    """Parse a selector; raises SelectorError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SelectorError(text, error.start, "text must be valid Unicode") from error
    parser = _Parser(text)
    selector = Selector(parser.parse())
    if parser.deepest == MAX_DEPTH:  # the canonical form may add a pair of parentheses
        _Parser(selector.canonical).parse()
    return selector


def normalise(text: str) -> str:
    """The canonical form, or the text without white space at its ends if it can't be parsed."""
    text = text.strip(_WHITE_SPACE)
    try:
        return parse(text).canonical
    except SelectorError:
        return text


def unique_id(prefix: str, content: str) -> str:
    """``prefix:`` and the unpadded base64url SHA-224 of ``prefix:content``: 38 characters more."""
    digest = hashlib.sha224(f"{prefix}:{content}".encode()).digest()
    return f"{prefix}:{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


# Unicode's White_Space property, which is what Go's strings.TrimSpace takes off.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# Possessive quantifiers (*+, ++): nothing is tried twice, so parsing takes linear time, and
# `rolestartswith"x"` is one long label, not `role starts with "x"`.
_SPACE = re.compile(r"[ \t]*+")
_LABEL = re.compile(r"[A-Za-z0-9_./-]++")
_OPERATOR = re.compile(
    r"==|!=|(?:contains|starts[ \t]*+with|ends[ \t]*+with|not[ \t]*+in|in)(?![A-Za-z0-9_./-])"
)
_STRING = re.compile(r"'([^']*+)'|\"([^\"]*+)\"")
_CALL = re.compile(r"(all|global|has)\([ \t]*+([A-Za-z0-9_./-]*+)[ \t]*+\)")
_CALL_START = re.compile(r"(?:all|global|has)\(")
_OPERATOR_NAMES = {"startswith": "starts with", "endswith": "ends with", "notin": "not in"}
_OPERATION_EXPECTED = "expected a label, has(label), all(), global(), ! or ("
_OPERATOR_EXPECTED = (
    "expected ==, !=, in, not in, contains, starts with or ends with after the label"
)


class _Parser:
    """Recursive descent over the text itself; the position always stands on a word."""

    __slots__ = ("deepest", "position", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.deepest = 0

    def parse(self) -> Node:
        self._skip(0)
        if self.position == len(self.text):
            return Everything("all")
        node = self._or(0)
        if self.position < len(self.text):
            raise self._error("expected && or || or the end")
        return node

    def _or(self, depth: int) -> Node:
        alternatives: list[Node] = []
        terms = [self._operation(depth)]
        while True:
            if self._take("&&"):
                terms.append(self._operation(depth))
            else:
                alternatives.append(terms[0] if len(terms) == 1 else And(tuple(terms)))
                if not self._take("||"):
                    break
                terms = [self._operation(depth)]
        return alternatives[0] if len(alternatives) == 1 else Or(tuple(alternatives))

    def _operation(self, depth: int) -> Node:
        negated = False
        while self._take("!"):
            negated = not negated
        node = self._group(depth) if self._take("(") else self._term()
        return Not(node) if negated else node

    def _group(self, depth: int) -> Node:
        if depth == MAX_DEPTH:
            raise self._error(f"parentheses are nested more than {MAX_DEPTH} deep")
        self.deepest = max(self.deepest, depth + 1)
        node = self._or(depth + 1)
        if not self._take(")"):
            raise self._error("expected && or || or )")
        return node

    def _term(self) -> Node:
        if _CALL_START.match(self.text, self.position):
            return self._call()
        label = self._label()
        operator = _OPERATOR.match(self.text, self.position)
        if operator is None:
            raise self._error(_OPERATOR_EXPECTED)
        self._skip(operator.end())
        name = "".join(operator[0].split())
        name = _OPERATOR_NAMES.get(name, name)
        if name in ("in", "not in"):
            return Membership(label, name, self._set())
        return Compare(label, name, self._string())

    def _call(self) -> Node:
        call = _CALL.match(self.text, self.position)
        if call is None:
            raise self._error("expected all(), global() or has(label)")
        name, label = call.groups()
        if bool(label) != (name == "has"):
            raise self._error("expected has(label)" if name == "has" else f"expected {name}()")
        self._check_length(label)
        self._skip(call.end())
        return Has(label) if name == "has" else Everything(name)

    def _label(self) -> str:
        label = _LABEL.match(self.text, self.position)
        if label is None:
            raise self._error(_OPERATION_EXPECTED)
        self._check_length(label[0])
        self._skip(label.end())
        return label[0]

    def _check_length(self, label: str) -> None:
        if len(label) > MAX_LABEL_LENGTH:
            raise self._error(f"a label has at most {MAX_LABEL_LENGTH} characters")

    def _set(self) -> tuple[str, ...]:
        if not self._take("{"):
            raise self._error('expected a set: {"value", …}')
        values: set[str] = set()
        while not self._take("}"):
            values.add(self._string())
            if not self._take(","):
                if not self._take("}"):
                    raise self._error("expected , or }")
                break
        return tuple(sorted(values))

    def _string(self) -> str:
        string = _STRING.match(self.text, self.position)
        if string is None:
            raise self._error("expected a value in quotes")
        self._skip(string.end())
        return string[0][1:-1]

    def _take(self, word: str) -> bool:
        if not self.text.startswith(word, self.position):
            return False
        self._skip(self.position + len(word))
        return True

    def _skip(self, position: int) -> None:
        space = _SPACE.match(self.text, position)
        self.position = space.end() if space else position

    def _error(self, expected: str) -> SelectorError:
        return SelectorError(self.text, self.position, expected)


def _quoted(value: str) -> str:
    return f"'{value}'" if '"' in value else f'"{value}"'


def _canonical(node: Node) -> str:
    match node:
        case Everything(name):
            return f"{name}()"
        case Has(label):
            return f"has({label})"
        case Compare(label, operator, value):
            return f"{label} {operator} {_quoted(value)}"
        case Membership(label, operator, values):
            return f"{label} {operator} {{{', '.join(map(_quoted, values))}}}"
        case Not(operand):
            return f"!{_canonical(operand)}"
        case And(operands):
            return f"({' && '.join(map(_canonical, operands))})"
        case Or(operands):
            return f"({' || '.join(map(_canonical, operands))})"


def _predicate(node: Node) -> Callable[[Labels], bool]:
    match node:
        case Everything():
            return lambda labels: True
        case Has(label):
            return lambda labels: label in labels
        case Compare(label, operator, value):
            return _comparison(label, operator, value)
        case Membership(label, "in", values):
            wanted = frozenset(values)
            return lambda labels: labels.get(label) in wanted
        case Membership(label, _, values):
            unwanted = frozenset(values)
            return lambda labels: labels.get(label) not in unwanted
        case Not(operand):
            inner = _predicate(operand)
            return lambda labels: not inner(labels)
        case And(operands):
            return _conjunction(tuple(map(_predicate, operands)), True)
        case Or(operands):
            return _conjunction(tuple(map(_predicate, operands)), False)


def _comparison(label: str, operator: str, value: str) -> Callable[[Labels], bool]:
    match operator:
        case "==":
            return lambda labels: labels.get(label) == value
        case "!=":
            return lambda labels: labels.get(label) != value
        case "contains":
            return lambda labels: (own := labels.get(label)) is not None and value in own
        case "starts with":
            return lambda labels: (own := labels.get(label)) is not None and own.startswith(value)
        case _:
            return lambda labels: (own := labels.get(label)) is not None and own.endswith(value)


def _conjunction(
    tests: tuple[Callable[[Labels], bool], ...], every: bool
) -> Callable[[Labels], bool]:
    """All of the tests (``every``) or any of them, without a generator's frame on each level."""

    def predicate(labels: Labels) -> bool:
        for test in tests:
            if test(labels) is not every:
                return not every
        return every

    return predicate
