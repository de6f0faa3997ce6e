"""Running a chat template, and finding in one run what it writes for every beginning of a conversation.

The mask needs to know what the template writes for the first k messages alone, for every k. Rendering each beginning
costs the square of the number of messages. `Template.beginnings` renders the conversation once instead, on a list that
notes what the template asks of it. Why the result is exact:

A template is a deterministic program, and the list's answers are all that it can learn about the messages. Its main
loop is the last `for` at the top of the template. Until that loop asks for message k, a run that has asked for
messages before k alone has got the same answers as a run over the first k messages, so both have written the same. At
that point the shorter run's loop ends. What is left is the template behind the loop: if it is made of constants and of
variables that the template never changes, it writes the same whatever came before, and the whole run shows what. So
the text of the first k messages is the whole run's text up to that point followed by the text behind the loop.

Whatever the list cannot account for (its length, its end, a loop that looks ahead, one that is left early) makes a
beginning unknown, and it is then rendered by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from bft_megatron.conversations.template_limits import Limits, TemplateFault

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes

Span = tuple[int, int]

_WATCH = "bft_watch"  # the variable under which a template finds what it reports to

# A template is compiled and given its data by transformers' own functions, which have no public names. Its public
# renderer counts the spans of n turns in the square of n, and takes no list but its own.


@dataclass(frozen=True)
class Inputs:
    """The inputs of a template besides the messages: functions that the assistant could call, and variables."""

    tools: list[Any] | None
    variables: dict[str, Any]


@dataclass(frozen=True)
class Beginnings:
    """The texts that a template writes for the beginnings of a conversation.

    Attributes:
        text: what it writes for the whole conversation.
        ends: k -> the number of the text's characters with which that of the first k messages begins.
        rest: the text behind the template's main loop, with which each of them ends.
    """

    text: str
    ends: dict[int, int]
    rest: str


def _unchanged(value: Any) -> Any:
    return value


class Template:
    """A compiled chat template.

    Args:
        source: Jinja source.
    """

    def __init__(self, source: str) -> None:
        from transformers.utils import chat_template_utils

        self.source = source
        # Releases before 5.22 give a template its data as they are.
        self.as_data: Callable[[Any], Any] = getattr(chat_template_utils, "_plain_template_data", _unchanged)
        self.with_thoughts: Callable[[Any], Any] = getattr(chat_template_utils, "_alias_reasoning_fields", _unchanged)
        self.plain: jinja2.Template = chat_template_utils._compile_jinja_template(source)

    @cached_property
    def watched(self) -> jinja2.Template | None:
        """The same template, reporting where its main loop is; None if it has none, or variable text behind it."""
        if _WATCH in self.source:
            return None
        environment = self.plain.environment
        tree = environment.parse(self.source)
        if not _report(tree, environment):
            return None
        return type(self.plain).from_code(environment, environment.compile(tree), environment.globals)

    def render(
        self, messages: list[dict[str, Any]], prompt: bool, given: Inputs, limits: Limits
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the spans of characters inside {% generation %}.

        Raises:
            TemplateFault: the text is longer than the limit.
        """
        run = _Run(limits)
        return run.text(self.plain, self._variables(self._shown(messages), prompt, given)), run.spans

    def beginnings(
        self, messages: list[dict[str, Any]], prompt: bool, given: Inputs, limits: Limits
    ) -> Beginnings | None:
        """Return the texts of a conversation's beginnings, or None if one run does not show them.

        Raises:
            TemplateFault: as `render`.
        """
        if self.watched is None:
            return None
        run = _Run(limits)
        watch = _Watch(run, self._shown(messages))
        variables = self._variables(_Messages(watch, 0), prompt, given) | {_WATCH: watch}
        try:
            text = run.text(self.watched, variables)
        except (TemplateFault, MemoryError):
            raise
        except Exception:  # the list does not do all that a list does
            return None
        end = watch.ends.pop(len(messages), None)
        return None if end is None else Beginnings(text, watch.ends, text[end:])

    def _shown(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages as transformers hands them to a template."""
        shown: list[dict[str, Any]] = self.with_thoughts(self.as_data(messages))
        return shown

    def _variables(self, messages: Any, prompt: bool, given: Inputs) -> dict[str, Any]:
        if any(not isinstance(tool, dict) for tool in given.tools or ()):
            raise TypeError("tools must be objects with a JSON schema")
        others = self.as_data({"documents": None} | given.variables)
        return dict(messages=messages, add_generation_prompt=prompt, tools=self.as_data(given.tools), **others)


class _Run:
    """One run of a template: the text as it is written, and the spans inside {% generation %}."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.written = 0
        self.spans: list[Span] = []

    def text(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        self.limits.restart()
        blocks: list[str] = []
        tracker: Any = template.environment
        most = self.limits.characters
        # transformers counts from the blocks before a span, so that with none of them it counts from this one's start.
        with tracker.activate_tracker((), self):
            for block in template.generate(variables):
                blocks.append(block)
                self.written += len(block)
                if self.written > most:
                    raise TemplateFault(f"the chat template writes more than {most:,} characters")
        return "".join(blocks)

    def append(self, span: Span) -> None:
        """Take a span that transformers found in the block that is being written."""
        self.spans.append((self.written + span[0], self.written + span[1]))


class _Unclear(Exception):
    """The template asks the list for something that a beginning would answer differently."""


class _Watch:
    """The record of what a run was told of the messages, and of what it had written when it asked for the next one.

    Attributes:
        told: the run has been told nothing of messages[told:].
        given: messages that the main loop was given.
        ended: turns of the loop that went through to their end. A loop that asks for the next message before that looks
            ahead.
        ends: k -> characters written when the loop asked for messages[k], if it had been told of none from k on.
    """

    def __init__(self, run: _Run, messages: list[dict[str, Any]]) -> None:
        self.run, self.messages = run, messages
        self.told = self.given = self.ended = 0
        self.ends: dict[int, int] = {}

    def loop(self, messages: Any) -> Iterator[dict[str, Any]]:
        """Return what the template's main loop goes through in place of `messages`. Called by the template."""
        if not isinstance(messages, _Messages):
            raise _Unclear
        return self._each(messages._start)

    def _each(self, start: int) -> Iterator[dict[str, Any]]:
        for k in range(start, len(self.messages) + 1):
            if self.told <= k and self.ended == self.given:
                self.ends[k] = self.run.written
            self.tell(k)
            if k < len(self.messages):
                self.given += 1
                yield self.messages[k]

    def end(self) -> None:
        """Note that a turn of the main loop has come to its end. Called by the template."""
        self.ended += 1

    def tell(self, k: int) -> None:
        """Note that the run is told whether there is a messages[k], or what it is."""
        if k < len(self.messages):  # without one, every beginning gets the same answer
            self.told = max(self.told, k + 1)


class _Messages:
    """The messages from `start` on as a template sees them; no list, so that nothing gets at them another way."""

    def __init__(self, watch: _Watch, start: int) -> None:
        self._watch, self._start = watch, start

    def __bool__(self) -> bool:
        self._watch.tell(self._start)
        return self._start < len(self._watch.messages)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            if type(key.start) is not int or key.start < 0 or key.stop is not None or key.step is not None:
                raise _Unclear
            return _Messages(self._watch, self._start + key.start)
        if not isinstance(key, int):
            raise TypeError
        if key < 0:
            raise _Unclear
        self._watch.tell(self._start + key)
        return self._watch.messages[self._start + key]

    def _refuse(self, *_: Any) -> NoReturn:
        raise _Unclear

    __len__ = __iter__ = __contains__ = __eq__ = __str__ = __repr__ = __format__ = __add__ = __radd__ = _refuse
    __hash__ = None  # type: ignore[assignment]  # as a list


def _report(tree: nodes.Template, environment: jinja2.Environment) -> bool:
    """Make a template report its main loop to `_WATCH`; return False if it has none, or variable text behind it."""
    from jinja2 import nodes

    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops:
        return False
    loop = tree.body[loops[-1]]
    assert isinstance(loop, nodes.For)
    if loop.test is not None or loop.recursive or loop.else_ or not _is_constant(tree.body[loops[-1] + 1 :], tree):
        return False

    def call(method: str, *given: Any) -> nodes.Call:
        return nodes.Call(nodes.Getattr(nodes.Name(_WATCH, "load"), method, "load"), [*given], [], None, None)

    loop.iter = call("loop", loop.iter)
    loop.body = [*loop.body, nodes.ExprStmt(call("end"))]
    for node in (loop.iter, loop.body[-1]):
        node.set_lineno(loop.lineno, override=True)
        node.set_environment(environment)
    return True


_HARMLESS = {"Output", "TemplateData", "If", "Test", "Compare", "Operand", "Const", "Name"}
_HARMLESS |= {"Not", "And", "Or", "CondExpr", "Add", "Concat"}


def _is_constant(behind: list[nodes.Node], tree: nodes.Template) -> bool:
    """Whether nodes write the same whatever the rest of the template did: no calls, no fields, no variable it sets.

    A variable that is only ever set to constants counts as one that it does not set, because a loop's own are not
    seen behind it.
    """
    from jinja2 import nodes

    steady = {id(node.target) for node in tree.find_all(nodes.Assign) if isinstance(node.node, nodes.Const)}
    changed = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load" and id(node) not in steady}
    changed |= {node.name for node in tree.find_all(nodes.Macro)} | {"messages"}
    found = [node for root in behind for node in (root, *root.find_all(nodes.Node))]
    return all(type(node).__name__ in _HARMLESS and getattr(node, "name", None) not in changed for node in found)
