"""Pictures of boxes, masks and label maps: what they colour, what they leave, and that no text is cut off."""

import numpy as np
import pytest
import torch
from PIL import Image

from muntin.errors import UserError
from muntin.measure.colours import class_colours, oklab
from muntin.measure.drawing import contact_sheet, draw

GREY = Image.new("RGB", (640, 480), (200, 200, 200))


def changed(picture, before=GREY):
    return (np.asarray(picture) != np.asarray(before)).any(-1)


def test_colours_are_far_apart_and_do_not_depend_on_their_number():
    colours = class_colours(256)
    assert len(set(colours)) == 256
    assert class_colours(7) == colours[:7]
    for count, least in ((10, 0.2), (20, 0.14), (150, 0.05)):  # 0.02 can just be seen
        lab = oklab(np.array(colours[:count]))
        distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
        assert distances[~np.eye(count, dtype=bool)].min() > least
    assert oklab(np.array([[255, 255, 255], [0, 0, 0]])) == pytest.approx(np.array([[1, 0, 0], [0, 0, 0]]), abs=1e-6)


def test_a_box_has_its_class_colour_at_its_edges_and_nothing_inside():
    colour = class_colours(3)[2]
    pixels = np.asarray(draw(GREY, torch.tensor([[100.0, 50.0, 300.0, 250.0]]), torch.tensor([2])))
    for x, y in ((100, 150), (299, 150), (200, 50), (200, 249)):
        assert tuple(pixels[y, x]) == colour
    rows, columns = np.nonzero(changed(pixels))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (49, 250, 99, 300)  # with its dark hairline
    assert not changed(pixels)[60:240, 110:290].any()


def test_a_mask_colours_its_pixels_alone():
    mask = np.zeros((480, 640), bool)
    mask[100:140, 200:260] = True
    mask[300:310, 500:600] = True
    pixels = np.asarray(draw(GREY, masks=mask[None], labels=[1]))
    assert (changed(pixels) == mask).all()
    red = class_colours(2)[1]
    assert tuple(pixels[100, 230]) == red  # the outline
    assert tuple(pixels[120, 230]) == pytest.approx(0.58 * np.array([200] * 3) + 0.42 * np.array(red), abs=1)


@pytest.mark.parametrize("size", [(128, 128), (100, 180), (2000, 1500)])
def test_objects_lie_where_they_are_in_enlarged_and_large_pictures(size):
    picture = Image.new("RGB", size, (10, 10, 10))
    box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2]
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    drawn = draw(picture, [box], [0], masks=[mask])
    factor = drawn.width / size[0]
    assert drawn.size == (factor * size[0], factor * size[1]) and max(drawn.size) >= 512
    rows, columns = np.nonzero((np.asarray(drawn) != 10).any(-1))
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert found == pytest.approx([factor * v for v in box], abs=2)


def test_text_stays_whole_at_every_border():
    text = 0
    for x, y in ((300, 200), (0, 0), (580, 0), (0, 420), (580, 420), (580, 200), (300, 420)):
        drawn = changed(draw(GREY, [[x, y, x + 60, y + 60]], [0], [0.5], classes=["an aeroplane"]))
        drawn[max(y - 2, 0) : y + 62, max(x - 2, 0) : x + 62] = False
        text = text or drawn.sum()
        assert drawn.sum() == pytest.approx(text, rel=0.15) and text > 1000


def test_texts_of_objects_at_one_place_do_not_cover_each_other():
    box = [300, 200, 400, 300]
    one = changed(draw(GREY, [box], [0], [0.9], classes=["person"])).sum()
    none = changed(draw(GREY, [box], [0])).sum()
    four = changed(draw(GREY, [box] * 4, [0] * 4, [0.9, 0.8, 0.7, 0.6], classes=["person"])).sum()
    assert four - none == pytest.approx(4 * (one - none), rel=0.1)  # they cover some of the frame


def test_a_label_map_tints_classes_leaves_what_is_ignored_and_names_what_occurs():
    label_map = torch.zeros(480, 640, dtype=torch.uint8)
    label_map[:, 320:] = 2
    label_map[400:, :] = 255
    palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    drawn = draw(GREY, label_map=label_map, classes=["sky", "unseen", "sea"], palette=palette)
    assert drawn.width == 640 and drawn.height > 500  # a legend below
    pixels = np.asarray(drawn)
    assert tuple(pixels[200, 100]) == pytest.approx((230, 90, 90), abs=1)
    assert tuple(pixels[200, 500]) == pytest.approx((90, 90, 230), abs=1)
    assert not changed(pixels[:480])[402:].any()
    legend = {tuple(colour) for colour in pixels[480:].reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 0, 255), (120, 120, 120)} <= legend and (0, 255, 0) not in legend


def test_long_and_foreign_names_fit():
    names = ["a class with a name that is much longer than any picture is wide " * 3, "Größe", "道路"]
    drawn = draw(GREY, [[10, 10, 50, 50]], [0], [1.0], classes=names)
    assert drawn.size == GREY.size
    label_map = np.repeat(np.arange(3), 160)[:, None].repeat(640, 1)
    legend = np.asarray(draw(GREY, label_map=label_map, classes=names))[480:]
    assert (legend[:, -3:] == 255).all()


def test_a_contact_sheet_has_all_pictures_in_cells_of_one_size():
    pictures = [Image.new("RGB", (w, h), (255, 0, 0)) for w, h in ((100, 80), (60, 100), (30, 30))]
    sheet = np.asarray(contact_sheet(pictures, 2))
    assert ((sheet == (255, 0, 0)).all(-1)).sum() == 100 * 80 + 60 * 100 + 30 * 30
    smaller = contact_sheet(pictures, 3, ["truth", "prediction", "a title too long for so small a cell"], side=50)
    assert smaller.width < sheet.shape[1]
    red = np.asarray(smaller) == (255, 0, 0)
    assert red.all(-1).sum() == pytest.approx(50 * 40 + 30 * 50 + 30 * 30, rel=0.02)


def test_refusals():
    with pytest.raises(UserError, match="2 objects and 1 scores"):
        draw(GREY, [[0, 0, 9, 9]] * 2, [0, 0], [0.5])
    with pytest.raises(UserError, match=r"mask 0 has the shape \(9, 9\) and its picture 480x640"):
        draw(GREY, masks=np.ones((1, 9, 9)))
    with pytest.raises(UserError, match="the label map has the shape"):
        draw(GREY, label_map=np.ones((480, 639), int))
    with pytest.raises(UserError, match="at least one picture"):
        contact_sheet([], 3)
