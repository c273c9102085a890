"""Reads spans out of what the OpenTelemetry Collector's debug exporter prints, and draws a trace as a tree.

    kubectl logs -n observability deployment/otelcol | python -m localcluster.traces --trace-id ID

The collector that runs here keeps no traces; its debug exporter (``verbosity: detailed``) prints every span
it receives. That text is meant for people, so a value with line breaks whose lines look like the
exporter's own headings cannot be told from them; nothing that moe-operator records is of that kind.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

Attributes = dict[str, Any]

_ATTRIBUTE: Final = re.compile(r"^ {5,} *-> (?P<key>.+?): (?P<kind>[A-Z][a-z]+)\((?P<value>.*)$", re.DOTALL)
_FIELD: Final = re.compile(r"^ {4}(?P<name>[A-Z][A-Za-z ]*?) *: (?P<value>.*)$", re.DOTALL)
_HEADING: Final = re.compile(
    r"^(Resource(?:Spans|Metrics) #\d+|Resource SchemaURL: .*|Resource attributes:|ScopeSpans #\d+"
    r"|ScopeSpans SchemaURL: .*|InstrumentationScope .*|Span #\d+|Attributes:"
    r"|Events:|SpanEvent #\d+|Links:|SpanLink #\d+)$"
)
_EVENT_NAME: Final = re.compile(r"^ {5}-> Name: (?P<name>.*)$", re.DOTALL)
# Lines of the collector's own log, and the one that ends a batch.
_OUTSIDE: Final = re.compile(r"^(\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-]\d{4})\t|\t\{)")
_BATCH: Final = re.compile(r"^\d{4}-\S+\t\w+\t(?=Resource(?:Spans|Metrics) #)")
_TIME: Final = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,9}))? \+0000 UTC$")
_PLAIN: Final = frozenset(
    {
        "rpc.system.name",
        "rpc.method",
        "gen_ai.provider.name",
        "gen_ai.operation.name",
        "gen_ai.request.stream",
    }
)


@dataclasses.dataclass
class Span:
    """One span as it was received; times in nanoseconds since 1970."""

    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""
    name: str = ""
    kind: str = ""
    start_ns: int = 0
    end_ns: int = 0
    status: str = ""
    status_message: str = ""
    resource: Attributes = dataclasses.field(default_factory=dict)
    attributes: Attributes = dataclasses.field(default_factory=dict)
    events: list[Attributes] = dataclasses.field(default_factory=list)

    @property
    def service(self) -> str:
        """Name of the process that made it."""
        return str(self.resource.get("service.name", "?"))


def _nanoseconds(text: str) -> int:
    match = _TIME.match(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a time as the collector prints it, 2026-01-31 12:00:00.5 +0000 UTC"
        )
    seconds = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    return int(seconds) * 10**9 + int((match[2] or "0").ljust(9, "0"))


# What the exporter calls a field, and how it is read.
_FIELDS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "Trace ID": ("trace_id", str),
    "Parent ID": ("parent_id", str),
    "ID": ("span_id", str),
    "Name": ("name", str),
    "Kind": ("kind", str),
    "Start time": ("start_ns", _nanoseconds),
    "End time": ("end_ns", _nanoseconds),
    "Status code": ("status", str),
    "Status message": ("status_message", str),
}

_VALUES: Final[dict[str, Callable[[str], Any]]] = {
    "Str": str,
    "Int": int,
    "Double": float,
    "Bool": lambda text: text == "true",
    "Slice": json.loads,
    "Map": json.loads,
    "Bytes": str,
    "Empty": lambda _: None,
}


def parse(log: str) -> list[Span]:
    """All spans in a collector's log, in the order in which they arrived."""
    spans: list[Span] = []
    resource: Attributes = {}
    into: Attributes | None = None
    of_spans = True
    for line in _logical_lines(log.split("\n")):
        if line.startswith(("ResourceSpans #", "ResourceMetrics #")):
            resource, into = {}, None
            of_spans = line.startswith("ResourceSpans #")
        elif not of_spans:
            continue
        elif line == "Resource attributes:":
            into = resource
        elif line.startswith("Span #"):
            spans.append(Span(resource=resource))
            into = None
        elif line == "Attributes:" and spans:
            into = spans[-1].attributes
        elif line.startswith("SpanEvent #"):
            into = {}
            if spans:
                spans[-1].events.append(into)
        elif line.startswith(("ScopeSpans #", "SpanLink #")):
            into = None
        else:
            _read_line(line, spans[-1] if spans else None, into)
    return spans


def trees(spans: Iterable[Span]) -> list[list[Span]]:
    """The spans by trace, each sorted by start; traces by their first start."""
    traces: dict[str, list[Span]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    by_start = [sorted(trace, key=lambda span: span.start_ns) for trace in traces.values()]
    return sorted(by_start, key=lambda trace: trace[0].start_ns)


def is_complete(trace: Sequence[Span]) -> bool:
    """Whether the trace has one root and no span whose parent is still missing."""
    known = {span.span_id for span in trace}
    return [span.parent_id in known for span in trace].count(False) == 1 and any(
        not span.parent_id for span in trace
    )


def render(trace: Sequence[Span]) -> Tree:
    """One trace as a tree with offsets, durations and attributes; spans without their parent are roots."""
    start, end = min(s.start_ns for s in trace), max(s.end_ns for s in trace)
    services = sorted({span.service for span in trace})
    heading = (
        f"trace {trace[0].trace_id}: {_duration(end - start)}, {len(trace)} spans of {', '.join(services)}"
    )
    tree = Tree(Text(heading, style="bold"))
    known = {span.span_id for span in trace}
    for span in trace:
        if span.parent_id not in known:
            _grow(tree, span, trace, start)
    return tree


def _grow(tree: Tree, span: Span, trace: Sequence[Span], start_ns: int) -> None:
    branch = tree.add(_label(span, start_ns))
    for child in trace:
        if child.parent_id == span.span_id:
            _grow(branch, child, trace, start_ns)


def _label(span: Span, start_ns: int) -> Text:
    name = span.name.rpartition(".")[2] if "/" in span.name else span.name
    style = "red" if span.status == "Error" else "cyan"
    label = Text.assemble((name, style), f"  {span.service}  +{_duration(span.start_ns - start_ns)}  ")
    label.append(_duration(span.end_ns - span.start_ns), style="bold")
    if span.status_message:
        label.append(f"  {span.status_message}", style="red")
    details = " ".join(_details(span))
    return label.append(f"\n{details}", style="dim") if details else label


def _details(span: Span) -> Iterator[str]:
    """Attributes without the first part of their names, and without what is the same in every trace."""
    for key, value in span.attributes.items():
        if key not in _PLAIN:
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            yield f"{key.partition('.')[2] or key}={f'{shown:.4g}' if isinstance(shown, float) else shown}"


def _duration(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:.2f} s" if nanoseconds >= 1e9 else f"{nanoseconds / 1e6:.1f} ms"


def _logical_lines(lines: Iterable[str]) -> Iterator[str]:
    """The exporter's lines, those of a value with line breaks joined, without the collector's own."""
    pending: str | None = None
    for raw in lines:
        line = _BATCH.sub("", raw)
        starts = any(form.match(line) for form in (_HEADING, _ATTRIBUTE, _FIELD, _EVENT_NAME))
        if not starts and not _OUTSIDE.match(line) and not line.startswith("     -> "):
            pending = f"{pending}\n{line}" if pending is not None else None
            continue
        if pending is not None:
            yield pending
        pending = line if starts else None
    if pending is not None:
        yield pending


def _read_line(line: str, span: Span | None, into: Attributes | None) -> None:
    attribute, field, event = _ATTRIBUTE.match(line), _FIELD.match(line), _EVENT_NAME.match(line)
    if event and span is not None and span.events and into is span.events[-1]:
        into["event.name"] = event["name"]
    elif attribute and into is not None:
        into[attribute["key"]] = _VALUES.get(attribute["kind"], str)(attribute["value"].removesuffix(")"))
    elif field and span is not None and field["name"] in _FIELDS:
        name, read = _FIELDS[field["name"]]
        setattr(span, name, read(field["value"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws one trace from standard input, or lists what there is."""
    parser = argparse.ArgumentParser(prog="python -m localcluster.traces", description=main.__doc__)
    parser.add_argument("--trace-id", help="32 hexadecimal digits; without it, all traces are listed")
    options = parser.parse_args(arguments)
    traces = trees(parse(sys.stdin.read()))
    if options.trace_id is None:
        for trace in traces:
            print(trace[0].trace_id, f"{len(trace)} spans", trace[0].name, sep="  ")
        return 0
    for trace in traces:
        if trace[0].trace_id == options.trace_id.lower():
            Console(width=None if sys.stdout.isatty() else 120).print(render(trace))
            return 0
    print(f"error: no trace {options.trace_id} among the {len(traces)} of this log", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
