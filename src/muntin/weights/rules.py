"""The engine behind the RULES of each family: other people's names of weights to ours, and back.

A rule pairs our name with the name of each dialect. In a name `{s}` stands for a number, `{2s+1}` for arithmetic
on it, `{m}` for a stage that begins with a merge (1 and up), `*` for the last part, and `(swin.)` for a
part that is written but need not be there. Where two rules share our name both are read, the first is written.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from muntin.errors import UserError, nearest

# In the order of preference where two dialects explain a file equally well. timm comes before the authors: a file
# with the merges at the end of stages 0 to 2 fits the authors better, one with stages 1 to 3 both alike.
DIALECTS = ("muntin", "timm", "authors", "torchvision", "transformers", "mm", "mmpretrain")
# mmpretrain (once mmcls) writes what mmdetection and mmsegmentation write, but for the ends of a classifier.
SPOKEN_LIKE = {"mmpretrain": "mm"}
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
# Buffers that follow from a configuration, the counters that averages keep, and what pretraining hides patches with.
DERIVED = re.compile(
    r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|attention_bias_idxs|attn\.ab|Relpos\.[a-z]+)$"
    r"|^(n_averaged|steps)$|(^|\.)mask_token$"
)
_TOKEN = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}|\(([^)]*)\)|(\*)")
_FIRST = {"m": 1}
_FLAT = re.compile(r"\b(layers|stages|patch_embed)_(\d|conv)")  # timm's features_only: layers_0 for layers.0


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """Our name, without `backbone.`, and theirs by dialect; several names of theirs are joined along axis 0."""

    ours: str
    theirs: Mapping[str, str | tuple[str, ...]]
    to_ours: Callable[[Tensor], Tensor] = _unchanged
    to_theirs: Callable[[Tensor], Tensor] = _unchanged

    def names(self, dialect: str) -> tuple[str, ...]:
        """The names in a dialect: none where the dialect has no such weight."""
        like = self.theirs.get(SPOKEN_LIKE.get(dialect, dialect), ())
        found = self.theirs.get(dialect, self.ours if dialect == "muntin" else like)
        return (found,) if isinstance(found, str) else found


Places = tuple[tuple[str, str], ...]
"""What the open parts of a name stand for: (("*", "weight"), ("b", "0"), ("s", "2"))."""


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> tuple[re.Pattern[str], tuple[tuple[str, int, int], ...]]:
    """A regular expression for a name, and letter, factor and offset of each of its groups."""
    text, places, end = "", [], 0
    for token in _TOKEN.finditer(pattern):
        factor, letter, offset, optional, _ = token.groups()
        text += re.escape(pattern[end : token.start()])
        if optional is not None:
            text += f"(?:{re.escape(optional)})?"
        elif letter is not None:
            text += r"(\d+)"
            places.append((letter, int(factor or 1), int(offset or 0)))
        else:
            text += r"([^.]+)"
            places.append(("*", 1, 0))
        end = token.end()
    return re.compile(text + re.escape(pattern[end:])), tuple(places)


def read_name(pattern: str, name: str) -> Places | None:
    """What the open parts of `pattern` stand for in `name`; None where it does not fit."""
    regex, places = _compile(pattern)
    match = regex.fullmatch(name)
    if match is None:
        return None
    values = {}
    for (letter, factor, offset), text in zip(places, match.groups(), strict=True):
        if letter != "*":
            number, rest = divmod(int(text) - offset, factor)
            if rest or number < _FIRST.get(letter, 0):
                return None
            text = str(number)
        values[letter] = text
    return tuple(sorted(values.items()))


def write_name(pattern: str, places: Places) -> str:
    """The name that `pattern` and its open parts make."""
    values = dict(places)

    def fill(token: re.Match[str]) -> str:
        factor, letter, offset, optional, star = token.groups()
        if optional is not None:
            return optional
        return values["*"] if star else str(int(factor or 1) * int(values[letter]) + int(offset or 0))

    return _TOKEN.sub(fill, pattern)


@dataclass(frozen=True)
class Source:
    """Where one of our weights comes from: the rule, and the file's names by part of the rule."""

    rule: Rule
    parts: dict[int, str] = field(default_factory=dict)

    def complete(self, dialect: str) -> bool:
        return len(self.parts) == len(self.rule.names(dialect))

    def __str__(self) -> str:
        return " + ".join(self.parts[part] for part in sorted(self.parts))


@dataclass(frozen=True)
class Reading:
    """The names of a state dict, read as one family's in one dialect.

    sources: by our name. unexpected, ignored: names in the file that are no weight here. twice: names in the file
    for a weight (ours) that another name has given already.
    """

    family: str
    dialect: str
    sources: dict[str, Source] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    twice: dict[str, str] = field(default_factory=dict)


def forms(name: str) -> Iterator[str]:
    """A name as it is, and without what wrappers put before it: `model.backbone.x`, `backbone.x`, `x`."""
    yield name
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
        yield name


def _stem(name: str) -> str:
    """All but the last part, with `#` for every number: equal in a name and in each pattern that it may fit."""
    return re.sub(r"\{[^}]*\}|\d+", "#", name).rpartition(".")[0]


Index = dict[str, list[tuple[Rule, int, str]]]


def _index(rules: list[Rule], dialect: str) -> Index:
    """Rule, part of the rule and its pattern, by what `_stem` leaves of the pattern."""
    result: Index = {}
    for rule in rules:
        for part, pattern in enumerate(rule.names(dialect)):
            for text in {re.sub(r"\(([^)]*)\)", kept, pattern) for kept in ("", r"\1")}:
                result.setdefault(_stem(text), []).append((rule, part, pattern))
    return result


def _outer(rules: list[Rule], dialect: str, names: Iterable[str]) -> str:
    """What stands before all names of a backbone that is a part of something else, such as `model.encoder.`.

    Found from the stem, a family's first rule; empty where the stem is in its place or in several places.
    """
    patterns = {_stem(re.sub(r"\([^)]*\)", "", pattern)): pattern for pattern in rules[0].names(dialect)}
    found = set()
    for name in names:
        for stem, pattern in patterns.items():
            if _stem(name).endswith(stem):
                parts = name.split(".")
                ends = (".".join(parts[start:]) for start in range(len(parts)))  # the longest first
                if (end := next((end for end in ends if read_name(pattern, end) is not None), None)) is not None:
                    found.add(name.removesuffix(end))
    outer = found.pop() if len(found) == 1 else ""
    return "" if "" in forms(outer) else outer


def _find(index: Index, name: str) -> tuple[Rule, int, Places, str] | None:
    """The rule for a name, which of the rule's parts it is, its places, and the prefix that was in the way."""
    for form in forms(name):
        for rule, part, pattern in index.get(_stem(form), ()):
            if (places := read_name(pattern, form)) is not None:
                return rule, part, places, name.removesuffix(form)
    flat = _FLAT.sub(r"\1.\2", name)
    return None if flat == name else _find(index, flat)


def _read(family: str, dialect: str, rules: list[Rule], names: Collection[str]) -> Reading:
    result = Reading(family, dialect)
    index, outer = _index(rules, dialect), _outer(rules, dialect, names)
    wrapped, unknown, prefixes = False, [], set()
    for name in names:
        found = _find(index, name.removeprefix(outer)) if name.startswith(outer) else None
        if DERIVED.search(name):
            result.ignored.append(name)
        elif found is None:
            unknown.append(name)
        else:
            rule, part, places, prefix = found
            prefix = outer + prefix
            wrapped |= "backbone." in prefix and dialect != "muntin"
            prefixes.add(prefix.removesuffix("backbone.") if dialect == "muntin" else prefix)
            ours = write_name(rule.ours, places)
            source = result.sources.setdefault(ours, Source(rule))
            if source.rule is not rule or part in source.parts:
                result.twice[name] = ours
            else:
                source.parts[part] = name
    # The neck and heads of a detector's or segmenter's file are no part of its backbone, nor is a training module's
    # loss a part of its `model.`.
    shared = prefixes.pop() if len(prefixes) == 1 else ""
    for name in unknown:
        beside = wrapped and "backbone." not in name or not name.startswith(shared)
        (result.ignored if beside else result.unexpected).append(name)
    for ours in [ours for ours, source in result.sources.items() if not source.complete(dialect)]:
        result.unexpected.extend(result.sources.pop(ours).parts.values())
    return result


def recognise(families: Mapping[str, list[Rule]], names: Collection[str]) -> Reading:
    """The family and dialect that explain the most names. UserError where none explains most of them, or two do."""
    best = _best_reading(families, names)
    if 10 * len(best.unexpected) >= len(names):
        other = _best_reading(families, best.unexpected)
        pair = len(best.sources), len(other.sources)
        if 10 * min(pair) >= len(names) and 2 * sum(pair) > len(names):
            told = [f"{next(iter(r.sources.values()))} ({r.family} by {r.dialect})" for r in (best, other)]
            raise UserError(f"names of two dialects, {told[0]} and {told[1]}: pass the weights of one model")
    matched = len(names) - len(best.unexpected) - len(best.ignored)
    if matched <= len(best.unexpected):
        raise UserError(
            f"no weights that are known here: {matched} of {len(names)} names fit {best.family}, "
            f"{preview(best.unexpected)} do not; known are {', '.join(families)} by {', '.join(DIALECTS)}"
        )
    for theirs, ours in best.twice.items():
        raise UserError(f"{ours} is there twice, once more as {theirs}: pass the weights of one model")
    return best


def _best_reading(families: Mapping[str, list[Rule]], names: Collection[str]) -> Reading:
    readings = []
    for family, rules in families.items():
        known = {dialect for rule in rules for dialect in rule.theirs} | {"muntin"}
        readings += [_read(family, dialect, rules, names) for dialect in DIALECTS if dialect in known]
    return max(readings, key=lambda reading: len(reading.sources))  # the first of equals


def explains(rules: list[Rule], names: Collection[str]) -> int:
    """How many of a model's names (without `backbone.`) are a family's."""
    return len(_read("", "muntin", rules, names).sources)


def read_plainly(ours: Collection[str], names: Iterable[str]) -> Reading:
    """Names that are the model's own, but for prefixes."""
    result = Reading("", "muntin")
    for name in names:
        own = next((form for form in forms(name) if form in ours), None)
        if own is None:
            result.unexpected.append(name)
        else:
            result.sources[own] = Source(Rule(own, {}), {0: name})
    return result


def translate(reading: Reading, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under our names (without `backbone.`). UserError where tensors cannot be joined or permuted."""
    weights = {}
    for ours, source in reading.sources.items():
        tensors = [state[source.parts[part]] for part in sorted(source.parts)]
        try:
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            weights[ours] = tensor if reading.dialect == "muntin" else source.rule.to_ours(tensor)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UserError(f"{source} of shape {shapes} cannot be {ours}: is the file whole?") from error
    return weights


def untranslate(rules: list[Rule], weights: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Our names (without `backbone.`) -> a dialect's. UserError where the dialect has no name for a weight."""
    known = sorted({name for rule in rules for name in rule.theirs})
    if dialect not in known:
        raise UserError(f"no dialect {dialect!r}{nearest(dialect, known)}; valid are muntin, {', '.join(known)}")
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for rule in rules:
            patterns, places = rule.names(dialect), read_name(rule.ours, name)
            if places is not None and patterns:
                joined = rule.to_theirs(tensor)
                parts = joined.chunk(len(patterns)) if len(patterns) > 1 else (joined,)
                result |= {write_name(p, places): part for p, part in zip(patterns, parts, strict=True)}
                break
        else:
            raise UserError(f"{dialect} has no name for {name}: leave it out, or choose another dialect")
    return result


def preview(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
