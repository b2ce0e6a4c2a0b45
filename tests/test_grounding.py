"""Grounding: maps against boxes, by a model whose maps are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from images import exif
from PIL import Image

from mlip_jax.core import schema
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.data.images.preprocessing import Preprocessing, decode
from mlip_jax.data.regions.opening import open_region_set
from mlip_jax.evaluations import grounding
from mlip_jax.evaluations.boxes import hits, iou, predicted_boxes
from mlip_jax.evaluations.sets import Sets
from mlip_jax.reports.grounding import draw_grounding
from mlip_jax.reports.style import save, style

COLORS = {"red": 0, "green": 1, "blue": 2}


class Finder:
    """Finds the colour that it is asked for, on a grid of 8 x 8."""

    preprocess = Preprocessing(32)

    def __init__(self, change=lambda maps: maps):
        self.change = change
        self.calls = []

    def saliency(self, images, texts):
        assert images.dtype == np.uint8 and images.shape == (len(texts), 32, 32, 3)
        self.calls.append(len(texts))
        channels = [COLORS[text.split()[1]] for text in texts]
        channel_planes = [image[:, :, c] / 255 for image, c in zip(images, channels, strict=True)]
        maps = np.array(channel_planes).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
        return self.change(maps.astype(np.float32))


@pytest.fixture
def spec(tmp_path):
    """Wide black images with a patch of each colour: 12 queries, the last on a torn image."""
    rows = []
    for index in range(4):
        pixels = np.zeros((64, 128, 3), np.uint8)
        for color, channel in COLORS.items():
            left, top = 16 * ((index + 3 * channel) % 7), 8 * ((2 * index + channel) % 6)
            pixels[top : top + 16, left : left + 32, channel] = 255
            box = [left, top, 32, 16]
            rows.append({"file": f"{index}.png", "caption": f"the {color} patch", "box": box})
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "patches.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"regions:{tmp_path / 'patches.jsonl'}"


def sets_of(model, spec="", **changes):
    config = schema.default()
    config.update_from_flattened_dict({"evaluation.grounding": (spec,), **changes})
    return Sets(model, config, progress=False)


def test_what_is_found_is_counted(spec):
    outcome = grounding.score(sets_of(Finder(), spec), spec)
    assert outcome.name == "patches"
    assert outcome.figures["pointing_game"] == 1
    assert outcome.figures["box_accuracy@0.5"] == 1 and outcome.figures["mean_iou"] > 0.6
    assert outcome.chance["pointing_game"] == pytest.approx(1 / 16)
    assert outcome.chance["mean_iou"] < 0.2
    assert set(outcome.examples.values()) == {12}
    assert (
        outcome.protocols["box_accuracy@0.5"] == "Grad-CAM, IoU >= 0.5, box at 0.5 of the maximum"
    )
    assert "those of other regions of the same image 0.0%" in outcome.note
    for mapping in (outcome.chance, outcome.examples, outcome.protocols):
        assert mapping.keys() == outcome.figures.keys()


def test_patches_that_do_not_cover_the_square_see_the_whole_image(spec):
    class Wider(Finder):
        preprocess = Preprocessing(39)

        def saliency(self, images, texts):
            return super().saliency(images[:, :32, :32], texts)

    changes = {"model.image.image_size": 39, "model.image.patch_size": 8}
    wider, expected = (
        grounding.saliency_maps(model, grounding.open_set(spec, config), config, progress=False)
        for model, config in (
            (Wider(), sets_of(Finder(), spec, **changes).config),
            (Finder(), sets_of(Finder(), spec).config),
        )
    )
    np.testing.assert_array_equal(wider.maps, expected.maps)
    np.testing.assert_array_equal(wider.boxes, expected.boxes)


def test_neither_batches_nor_rounding_change_the_figures(spec):
    first = grounding.score(sets_of(Finder(), spec), spec)
    model = Finder(lambda maps: maps * np.float32(1 + 1e-6) + np.float32(1e-8))
    assert grounding.score(sets_of(model, spec, **{"evaluation.batch_size": 5}), spec) == first
    assert model.calls == [5, 5, 2]


def test_the_threshold_is_the_configs(spec):
    outcome = grounding.score(sets_of(Finder(), spec, **{"evaluation.box_threshold": 0.25}), spec)
    assert "box at 0.25 of the maximum" in outcome.protocols["mean_iou"]
    assert outcome.figures != grounding.score(sets_of(Finder(), spec), spec).figures


def test_a_model_that_marks_all_alike_finds_nothing(spec):
    for value in (0.0, 0.5):
        model = Finder(lambda maps, value=value: np.full_like(maps, value))
        outcome = grounding.score(sets_of(model, spec), spec)
        assert set(outcome.figures.values()) == {0.0}
        assert outcome.chance["pointing_game"] > 0


def test_unreadable_images_are_left_out_and_told(spec, tmp_path):
    (tmp_path / "3.png").write_bytes(b"torn")
    with pytest.raises(
        UserError, match="the images of 3 of 12 queries of the dataset 'patches'.*3.png"
    ):
        grounding.score(sets_of(Finder(), spec), spec)
    sets = sets_of(Finder(), spec, **{"data.max_skipped_share": 0.5, "evaluation.batch_size": 3})
    outcome = grounding.score(sets, spec)
    assert outcome.examples["mean_iou"] == 9 and outcome.figures["pointing_game"] == 1
    assert "1 unreadable images are left out, the first: " in outcome.note
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the 12 queries"):
        grounding.score(sets, spec)


def test_what_is_no_map_is_an_error(spec):
    def damage(maps):
        maps[4, 0, 0] = np.nan
        return maps

    with pytest.raises(
        RunError, match="1 of 12 saliency maps hold NaN .* query 4 of the dataset 'pat"
    ):
        grounding.score(sets_of(Finder(damage), spec), spec)
    with pytest.raises(UserError, match="this model gives no saliency maps"):
        grounding.score(sets_of(object(), spec), spec)


def test_sets_are_checked_by_opening_them(spec):
    grounding.check(sets_of(None), spec)
    with pytest.raises(UserError, match="did you mean 'regions:'"):
        grounding.check(sets_of(None), spec.replace("regions", "region"))


def test_sets_of_one_name_are_told_apart(spec, tmp_path):
    other = spec.replace("patches", "more/patches")
    sets = sets_of(Finder(), **{"evaluation.grounding": (other, spec)})
    assert grounding.score(sets, spec).name == "patches-2"


def test_a_hit_is_the_centre_of_the_strongest_cell():
    maps = np.zeros((6, 2, 4), np.float32)
    maps[:5, 1, 3] = 1  # its centre: (7/8, 3/4)
    maps[3, 1, 2] = 1  # ties, centre (5/8, 3/4)
    maps[4, 0, 0] = 1 - 1e-7
    boxes = np.array([[0.8, 0.7, 1, 1], [0.9, 0.5, 1, 1], [0.5, 0.5, 1, 0.75]])
    boxes = np.concatenate([boxes, np.array([[0.6, 0.5, 1, 1]] * 2), [[0, 0, 1, 1]]])
    assert hits(maps, boxes).tolist() == [True, False, False, True, False, False]


def test_the_box_is_tight_around_the_largest_part():
    maps = np.zeros((4, 8, 8), np.float32)
    maps[0, 2:5, 1:3] = 1
    maps[0, 7, 7] = 3  # the maximum, but smaller
    maps[1, 0, :] = 2
    maps[3] = 1
    expected = [[1 / 8, 2 / 8, 3 / 8, 5 / 8], [0, 0, 1, 1 / 8]]
    np.testing.assert_array_equal(predicted_boxes(maps, 0.3, 8)[:2], expected)
    assert np.isnan(predicted_boxes(maps, 0.3, 8)[2:]).all()
    np.testing.assert_array_equal(predicted_boxes(maps, 0.5, 8)[0], [7 / 8, 7 / 8, 1, 1])
    # Half of the maximum of a bilinear map lies half a cell beyond the outermost centres.
    assert predicted_boxes(maps, 0.5, 64)[1, 3] == pytest.approx(1 / 8)


def test_iou_by_hand():
    one = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0, 0, 1, 1], [np.nan] * 4])
    other = np.array([[0.25, 0, 0.75, 0.5], [0.5, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, 1, 1]])
    np.testing.assert_allclose(iou(one, other), [1 / 3, 0, 0.5, 0])


def test_examples_run_from_the_best_to_the_worst(spec, tmp_path):
    def spoil(maps):
        maps[::2] = maps[::2].transpose(0, 2, 1)
        return maps

    sets = sets_of(Finder(spoil), spec)
    regions = grounding.open_set(spec, sets.config)
    examples = grounding.examples(Finder(spoil), regions, sets.config, 5)
    overlaps = [example.iou for example in examples]
    everything = grounding.examples(Finder(spoil), regions, sets.config, 99)
    assert overlaps == sorted(overlaps, reverse=True) and len(everything) == 12
    assert overlaps[0] == everything[0].iou and overlaps[-1] == everything[-1].iou
    figures = grounding.score(sets, spec).figures
    assert figures["mean_iou"] == pytest.approx(np.mean([each.iou for each in everything]))
    assert figures["pointing_game"] == np.mean([each.hit for each in everything])
    assert len(grounding.examples(Finder(spoil), regions, sets.config, 99, among=4)) == 4


def test_examples_are_drawn(spec, tmp_path):
    config = sets_of(None).config
    regions = grounding.open_set(spec, config)
    finder_examples = grounding.examples(Finder(), regions, config, 8)
    nothing = grounding.examples(Finder(np.zeros_like), regions, config, 1)
    with style():
        for examples in (finder_examples, nothing):
            figure = draw_grounding(examples)
            save(figure, tmp_path / "grounding.png")
            titles = [axes.get_title("left") for axes in figure.axes if axes.axison]
            assert titles == [example.expression for example in examples]
            labels = [axes.get_xlabel() for axes in figure.axes if axes.axison]
            assert labels == [
                f"{'hit' if example.hit else 'miss'}, IoU {example.iou:.2f}" for example in examples
            ]
    assert labels == ["miss, IoU 0.00"]


@pytest.mark.parametrize("heeded", ["exif", "ignore"])
def test_boxes_of_images_that_lie_on_their_side(spec, heeded):
    """Boxes are of the pixels as they are stored, and turned with the image."""
    folder = Path(spec.removeprefix("regions:")).parent
    for file, tag in zip(sorted(folder.glob("*.png")), (3, 5, 6, 8), strict=True):
        image = Image.open(file)
        image.load()
        image.save(file, exif=exif(tag))
    finder = Finder()
    finder.preprocess = Preprocessing(32, orientation=heeded)
    sets = sets_of(finder, spec)
    outcome = grounding.score(sets, spec)
    assert outcome.figures["pointing_game"] == outcome.figures["box_accuracy@0.5"] == 1
    shown = grounding.examples(finder, open_region_set(spec), sets.config, 20)
    assert len(shown) == 12
    for example in shown:
        upright = decode(example.image, upright=True)
        color = COLORS[example.expression.split()[1]]
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(example.box, upright.size * 2, strict=True)
        )
        inside = np.asarray(upright)[top:bottom, left:right, color]
        assert inside.size == 32 * 16 and (inside == 255).all()
        assert iou(np.array([example.predicted]), np.array([example.box]))[0] > 0.6
        row, column = np.unravel_index(example.saliency.argmax(), example.saliency.shape)
        assert left <= (column + 0.5) / 8 * upright.width <= right
        assert top <= (row + 0.5) / 8 * upright.height <= bottom
    with style():
        draw_grounding(shown[:4])
