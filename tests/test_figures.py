"""Pictures: what must be drawn is drawn, where it must be, and wrong input is refused."""

import numpy
import pytest
from PIL import Image

from nervenet.study import figures
from nervenet.study.figures import (BLUE, HEAT, ORANGE, PAPER, SKY, VERMILLION, best_median_worst, curves,
                                    display_size, feature_maps, fold_curves, grid, heat, nice_ticks, overlay,
                                    picture, predictions, rectangle)

ONE_PANEL = (('loss', 'Loss'),)


def coloured(image, colour, tolerance=0):
    """Return where `image` shows `colour`, as a bool array (height, width)."""
    return (abs(numpy.asarray(image).astype(int) - colour) <= tolerance).all(axis=2)


def plot_of(image):
    """Return (left, top, right, bottom) of the only plot in `image`, from its level grid lines."""
    lines = coloured(image, figures.LINE)
    rows = numpy.flatnonzero(lines.sum(axis=1) > 200)                        # not the soft edges of letters
    columns = numpy.flatnonzero(lines[rows].any(axis=0))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.fixture
def written(monkeypatch):
    """The list of all texts that are written into pictures during the test."""
    texts, write = [], figures._write
    monkeypatch.setattr(figures, '_write', lambda draw, position, text, *rest, **options:
                        texts.append(text) or write(draw, position, text, *rest, **options))
    return texts


# Curves

def test_a_curve_runs_through_its_values():
    """Values on round numbers lie on the grid lines of those numbers, at evenly spaced epochs."""
    values = numpy.array([0.0, 1.0, 0.5, 0.25, 0.0])
    image = curves({'train_loss': values, 'validation_loss': [numpy.nan] * 5}, ONE_PANEL)
    left, _, right, _ = plot_of(image)
    # Ends of the axis: epochs 1 to 5 and 1.5 % of the span on either side, and 6 % above and below the values.
    columns = left + (numpy.arange(5) / 4 + 0.015) / 1.03 * (right - left + 1)
    blue = coloured(image, BLUE)
    blue[:100] = False                                                       # the legend
    rows = [numpy.flatnonzero(blue[:, round(column)]).mean() for column in columns]
    zero, one = rows[0], rows[1]
    assert one < zero - 100                                                  # larger values are higher up
    numpy.testing.assert_allclose([(zero - row) / (zero - one) for row in rows], values, atol=0.01)
    grid_rows = numpy.flatnonzero(coloured(image, figures.LINE).sum(axis=1) > 200)
    assert abs(grid_rows - zero).min() <= 2 and abs(grid_rows - one).min() <= 2


def test_training_and_validation_have_colours_of_their_own():
    image = curves([{'train_loss': 1.0, 'validation_loss': 2.0}] * 40, ONE_PANEL)
    blue, vermillion = (numpy.nonzero(coloured(image, colour))[0].max() for colour in (BLUE, VERMILLION))
    assert blue > vermillion + 50                                            # 1 is below 2


def test_a_gap_where_a_value_is_missing():
    values = numpy.ones(101)
    values[40:61] = numpy.nan
    image = curves({'train_loss': values}, ONE_PANEL)
    left, top, right, bottom = plot_of(image)
    drawn = coloured(image, BLUE)[top:bottom].any(axis=0)[left:right + 1]
    width = len(drawn)
    assert drawn[round(0.1 * width):round(0.38 * width)].all() and drawn[round(0.62 * width):round(0.9 * width)].all()
    assert not drawn[round(0.42 * width):round(0.58 * width)].any()


@pytest.mark.parametrize('missing', [numpy.nan, numpy.inf, -numpy.inf, None, ''])
def test_a_value_between_missing_ones_is_a_dot(missing):
    image = curves({'train_loss': [*[missing] * 30, 1.0, *[missing] * 30]}, ONE_PANEL)
    left, top, right, bottom = plot_of(image)
    rows, columns = numpy.nonzero(coloured(image, BLUE)[top:bottom, left:right])
    assert 5 <= numpy.ptp(rows) <= 12 and 5 <= numpy.ptp(columns) <= 12
    assert abs(columns.mean() - (right - left) / 2) < 2


@pytest.mark.parametrize('history', [
    [{'epoch': 1, 'train_loss': 0.5, 'validation_loss': 0.7}],               # one epoch
    [{'epoch': 1, 'train_loss': 0.5}, {'epoch': 2, 'train_loss': 0.4, 'validation_loss': 0.7}],
    {'train_loss': numpy.random.default_rng(0).random(1000)},
    {'train_loss': [0.25] * 30, 'validation_loss': [0.25] * 30},             # constant
    {'train_loss': [0, 0, 0]},
    {'train_loss': [-1e30, 1e30]},
    {'train_loss': [1e-9, 2e-9]},
    {'train_loss': [1e6, 1e6 + 1e-6]},
    {'train_loss': [numpy.nan, numpy.nan]},
    {'epoch': ['1', '2'], 'train_loss': ['0.5', ''], 'validation_loss': ['0.7', '0.6']},    # as read from a CSV file
])
def test_unusual_histories_are_drawn(history):
    image = curves(history, ONE_PANEL, title='Title')
    assert image.mode == 'RGB' and image.size == curves({'train_loss': [1, 2]}, ONE_PANEL, title='x').size
    border = numpy.asarray(image).copy()
    border[10:-10, 10:-10] = 255
    assert (border == 255).all()                                             # nothing runs out of the picture


def test_four_panels_by_default():
    metrics = 'loss', 'accuracy', 'iou_pooled', 'dice_pooled'
    history = [{f'{part}_{metric}': 0.5 for part in ('train', 'validation') for metric in metrics} for _ in range(3)]
    image = curves(history)
    assert 1200 <= image.width <= 1600
    quarters = [image.crop((x, y, x + image.width // 2, y + image.height // 2))
                for x in (0, image.width // 2) for y in (0, image.height // 2)]
    assert all(coloured(quarter, VERMILLION).any() for quarter in quarters)


def test_baselines_are_broken_lines_at_their_level():
    image = curves({'train_loss': [0.0, 1.0]}, ONE_PANEL, {'mean mask': {'loss': 0.25}, 'elsewhere': {'iou': 5.0}})
    left, top, right, bottom = plot_of(image)
    rows = numpy.flatnonzero(coloured(image, figures.FAINT)[:, left:right].sum(axis=1) > 200)
    ends = numpy.flatnonzero(coloured(image, figures.LINE).sum(axis=1) > 200)[[-1, 0]]       # the lines of 0 and 1
    level = (ends[0] - rows[rows < bottom].mean()) / (ends[0] - ends[1])
    assert abs(level - 0.25) < 0.02
    assert coloured(image, figures.FAINT)[rows[0], left:right].mean() < 0.8   # broken


def test_folds_show_their_mean_and_band():
    histories = [{'train_loss': [value] * 50} for value in (0.0, 1.0, 2.0)]
    image = numpy.asarray(fold_curves(histories, ONE_PANEL))[100:]            # without the legend
    column = image[:, image.shape[1] // 2].astype(int)
    runs = figures._runs(column[:, 2] - column[:, 0] > 20)                   # fold of 2, band around 1, fold of 0
    assert len(runs) == 3
    high, middle, low = (runs.sum(axis=1) - 1) / 2                           # their middle rows
    assert abs(middle - (high + low) / 2) <= 1
    assert abs((column == BLUE).all(axis=1).nonzero()[0].mean() - middle) <= 1               # the mean is bold
    deviation = numpy.sqrt(2 / 3) * (low - high) / 2
    assert abs((runs[1, 1] - runs[1, 0]) / 2 - deviation) <= 2


def test_folds_of_different_length_are_averaged_where_they_are():
    image = fold_curves([{'train_loss': [1.0] * 10}, {'train_loss': [3.0] * 20}], ONE_PANEL)
    left, _, right, _ = plot_of(image)
    blue = coloured(image, BLUE)
    blue[:100] = False
    early, late = (numpy.flatnonzero(blue[:, left + round(share * (right - left))]).mean() for share in (0.2, 0.9))
    assert late < early - 50                                                 # 2, the mean of both; then 3


def test_an_infinite_value_of_one_fold_leaves_the_mean_of_the_others():
    diverged, missing = ([{'train_loss': [1.0, value, 2.0]}, {'train_loss': [1.0, 3.0, 2.0]}]
                         for value in (numpy.inf, numpy.nan))
    assert fold_curves(diverged, ONE_PANEL) == fold_curves(missing, ONE_PANEL)


@pytest.mark.parametrize('history, problem', [
    ([], 'empty'),
    ({}, 'empty'),
    ({'train_loss': []}, 'empty'),
    ({'epoch': [1, 2], 'train_loss': [1, 2, 3]}, "'train_loss': 3"),
    ([{'epoch': 1, 'train_dice': 3}], 'train_loss or validation_loss; .* train_dice'),
])
def test_histories_that_cannot_be_drawn_are_refused(history, problem):
    with pytest.raises(ValueError, match=problem):
        curves(history, ONE_PANEL)


def test_no_folds_are_refused():
    with pytest.raises(ValueError, match='no history'):
        fold_curves([], ONE_PANEL)


@pytest.mark.parametrize('low, high, expected', [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-0.9, -0.1, [-0.8, -0.6, -0.4, -0.2]),
    (0.951, 0.989, [0.96, 0.97, 0.98]),
    (3, 1200, [200, 400, 600, 800, 1000, 1200]),
])
def test_ticks_are_round_numbers_inside(low, high, expected):
    numpy.testing.assert_allclose(nice_ticks(low, high), expected, atol=1e-12)


def test_ticks_of_epochs_are_whole():
    numpy.testing.assert_array_equal(nice_ticks(0.98, 3.02, 8, whole=True), [1, 2, 3])


def test_no_tick_before_the_first_epoch(written):
    curves({'train_loss': numpy.linspace(5, 6, 1000)}, ONE_PANEL)
    assert '200' in written and '1000' in written and '0' not in written


def test_no_negative_zero():
    assert not numpy.signbit(nice_ticks(-0.05, 1)[0])


def test_text_is_cut_to_its_place_and_written_in_letters_of_the_font():
    sheet = grid([[Image.new('RGB', (120, 20), ORANGE)]], captions=[['a very long name ' * 9]], title='long title ' * 9)
    dark = numpy.asarray(sheet).min(axis=2) < 200
    dark[coloured(sheet, ORANGE)] = False
    assert dark.any() and not dark[:, 150:].any()
    assert figures._printable('96×128, é – ± · … 名') == '96x128, e - ± · ... ?'
    missing = bytes(figures._font(18).getmask('\uffff'))
    assert all(bytes(figures._font(18).getmask(letter)) != missing for letter in 'x±·…?-')


# Images and masks

def test_small_images_are_enlarged_by_a_whole_factor():
    assert display_size((96, 128), 512) == (384, 512)
    assert display_size((139, 192), 512) == (417, 576)
    assert display_size((420, 580), 290) == (210, 290)
    assert display_size((1, 1), 350) == (350, 350)
    assert display_size((2000, 1), 350) == (350, 1)
    assert picture(numpy.zeros((96, 128))).size == (512, 384)
    assert picture(numpy.zeros((420, 580), 'uint8')).size == (580, 420)


def test_pictures_keep_grey_levels():
    for image in (numpy.full((5, 7), 100, 'uint8'), numpy.full((5, 7, 1), 100 / 255, 'float32')):
        assert (numpy.asarray(picture(image)) == 100).all()


@pytest.mark.parametrize('image, problem', [
    (numpy.zeros((4, 5, 3)), r'shape \(4, 5, 3\)'),
    (numpy.zeros(4), 'shape'),
    (numpy.zeros((0, 4)), 'shape'),
    (numpy.zeros((4, 5), 'int64'), 'dtype int64'),
    (numpy.full((4, 5), 255.0), 'from 255.0'),
    (numpy.full((4, 5), -0.1), 'from -0.1'),
    (numpy.full((4, 5), numpy.nan), 'nan'),
])
def test_images_of_another_kind_are_refused(image, problem):
    for draw in (lambda: picture(image), lambda: overlay(image, numpy.zeros((4, 5))),
                 lambda: heat(image, numpy.zeros((4, 5)))):
        with pytest.raises(ValueError, match=problem):
            draw()


def square(size=(24, 30), top=6, left=9, height=10, width=12):
    mask = numpy.zeros(size, bool)
    mask[top:top + height, left:left + width] = True
    return mask


@pytest.mark.parametrize('scale', [bool, 'uint8', 255])
def test_the_outline_lies_just_inside_the_mask(scale):
    mask = square() * 255 if scale == 255 else square().astype(scale)
    shown = overlay(numpy.full(mask.shape, 0.5), mask, size=(240, 300))      # ten times as large
    outline = coloured(shown, ORANGE, 3)
    rows, columns = numpy.nonzero(outline)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 159, 90, 209)
    assert outline[60, 100:200].all() and outline[159, 100:200].all()
    assert outline[70:150, 90].all() and outline[70:150, 209].all()
    assert not outline[70:150, 100:200].any()
    inside, outside = shown.getpixel((150, 110)), shown.getpixel((40, 30))
    assert outside == (128, 128, 128)
    numpy.testing.assert_allclose(inside, 128 + 0.25 * (numpy.array(ORANGE) - 128), atol=2)  # a pale fill


def test_the_truth_is_seen_beside_the_prediction_where_they_agree():
    shown = overlay(numpy.zeros((24, 30)), square(), square(), size=(240, 300))
    blue, orange = coloured(shown, SKY, 3), coloured(shown, ORANGE, 3)
    assert blue[59, 100:200].all() and orange[60, 100:200].all()
    assert blue[70:150, 210].all() and orange[70:150, 209].all()


def test_empty_masks_change_nothing():
    image = numpy.random.default_rng(0).random((11, 17))
    empty = numpy.zeros((11, 17), bool)
    numpy.testing.assert_array_equal(overlay(image, empty, empty), picture(image))


def test_one_pixel_is_seen_at_every_size():
    mask = square(top=5, left=7, height=1, width=1)
    for size in (mask.shape, (48, 60), (240, 300)):
        assert numpy.asarray(overlay(numpy.zeros(mask.shape), mask, size=size)).max() > 0.7 * max(ORANGE)


def test_a_mask_that_fills_the_image_is_filled():
    shown = overlay(numpy.zeros((8, 9)), numpy.ones((8, 9)), size=(80, 90))
    numpy.testing.assert_allclose(numpy.asarray(shown)[0, 0], 0.25 * numpy.array(ORANGE), atol=1)


@pytest.mark.parametrize('mask, problem', [
    (numpy.zeros((5, 4)), r'shape \(5, 4\), its image \(4, 5\)'),
    (numpy.full((4, 5), 0.3), 'threshold'),
    (numpy.full((4, 5), numpy.nan), 'threshold'),
    (numpy.arange(20).reshape(4, 5), 'from 0 to 19'),
])
def test_masks_that_are_not_binary_or_not_of_the_size_are_refused(mask, problem):
    image = numpy.zeros((4, 5))
    with pytest.raises(ValueError, match=problem):
        overlay(image, mask)
    with pytest.raises(ValueError, match=problem):
        overlay(image, image, mask)
    with pytest.raises(ValueError, match=problem):
        predictions([{'image': image, 'prediction': mask}])


def test_heat_is_brightest_at_the_largest_magnitude():
    magnitude = numpy.zeros((24, 30))
    magnitude[7, 20], magnitude[15, 4] = 4, 1
    shown = numpy.asarray(heat(numpy.zeros((24, 30)), magnitude, size=(24, 30))).astype(int)
    numpy.testing.assert_allclose(shown[7, 20], HEAT[-1], atol=1)
    assert 0 < shown[15, 4].sum() < shown[7, 20].sum()
    assert shown.sum(axis=2).astype(bool).sum() == 2
    image = numpy.full((24, 30), 0.5)
    numpy.testing.assert_array_equal(heat(image, 0 * magnitude), picture(image))


@pytest.mark.parametrize('magnitude', [numpy.zeros((5, 4)), numpy.full((4, 5), -1), numpy.full((4, 5), numpy.nan),
                                       numpy.full((4, 5), numpy.inf)])
def test_heat_refuses_what_is_no_magnitude(magnitude):
    with pytest.raises(ValueError, match='magnitude'):
        heat(numpy.zeros((4, 5)), magnitude)


def test_a_rectangle_frames_its_pixels():
    shown = Image.new('RGB', (300, 240))
    framed = rectangle(shown, (6, 9, 10, 12), (24, 30))                      # pixels 60…159 by 90…209 of the picture
    frame = coloured(framed, ORANGE)
    assert not coloured(shown, ORANGE).any()                                 # the argument is as it was
    assert frame[57:60, 87:213].all() and frame[160:163, 87:213].all()
    assert frame[57:163, 87:90].all() and frame[57:163, 210:213].all()
    assert not frame[60:160, 90:210].any() and frame.sum() == 106 * 126 - 100 * 120
    beyond = coloured(rectangle(shown, (-50, -50, 100, 200), (24, 30)), ORANGE)
    assert beyond[0].all() and beyond[-1].all() and beyond[:, 0].all() and beyond[:, -1].all()


# Many pictures in one

def test_grid_puts_every_picture_in_its_place():
    red, green, tall = (Image.new('RGB', size, colour)
                        for size, colour in (((50, 20), (255, 0, 0)), ((30, 20), (0, 255, 0)), ((40, 60), (0, 0, 255))))
    sheet = numpy.asarray(grid([[red, green], [None, tall]]))
    margin, gap = 2 * figures.GAP, figures.GAP
    assert sheet.shape == (20 + gap + 60 + 2 * margin, 50 + gap + 40 + 2 * margin, 3)
    for colour, (top, left, height, width) in (((255, 0, 0), (margin, margin, 20, 50)),
                                               ((0, 255, 0), (margin, margin + 50 + gap, 20, 30)),
                                               ((0, 0, 255), (margin + 20 + gap, margin + 50 + gap, 60, 40))):
        expected = numpy.zeros(sheet.shape[:2], bool)
        expected[top:top + height, left:left + width] = True
        numpy.testing.assert_array_equal((sheet == colour).all(axis=2), expected)
    assert (sheet[margin + 20 + gap:, :margin + 50] == PAPER).all()          # the empty place


def test_grid_makes_room_for_text():
    cell = Image.new('RGB', (200, 50), ORANGE)
    plain = grid([[cell]])
    for text in ({'title': 'text'}, {'captions': [['text']]}, {'row_titles': ['text']}, {'column_titles': ['text']}):
        sheet = grid([[cell]], **text)
        assert sheet.height > plain.height and coloured(sheet, ORANGE).sum() == 200 * 50
        assert numpy.asarray(sheet).min() < 150 and numpy.asarray(sheet)[:10].min() == 255


def test_best_median_worst():
    assert best_median_worst([0.3, 0.9, 0.5, 0.0, 0.7]) == [('best', 1), ('median', 2), ('worst', 3)]
    assert best_median_worst([0.1, 0.4]) == [('best', 1), ('worst', 0)]
    assert best_median_worst([0.1]) == [('best', 0)]
    for scores in ([], [0.1, numpy.nan], [[0.1]]):
        with pytest.raises(ValueError, match='scores'):
            best_median_worst(scores)


def test_predictions_show_image_truth_prediction_and_overlay():
    image, truth, prediction = numpy.full((24, 30), 0.5), square(), square(left=12)
    sheet = predictions([{'name': '1_1', 'label': 'best', 'image': image, 'truth': truth, 'prediction': prediction}])
    assert 1200 <= sheet.width <= 1600
    lefts = range(2 * figures.GAP, sheet.width - 2 * figures.GAP, 12 * 30 + figures.GAP)     # twelve times as large
    columns = [sheet.crop((left, 0, left + 12 * 30, sheet.height)) for left in lefts]
    shares = [[coloured(column, colour, 2).mean() for colour in (SKY, ORANGE, (128, 128, 128))] for column in columns]
    seen = numpy.array(shares) > 0.002
    numpy.testing.assert_array_equal(seen, [[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]])


def test_predictions_write_the_dice(written):
    image, empty = numpy.zeros((24, 30)), numpy.zeros((24, 30))
    predictions([{'name': 'a', 'label': 'median', 'image': image, 'truth': square(), 'prediction': square(left=15)},
                 {'name': 'b', 'image': image, 'truth': empty, 'prediction': empty},
                 {'name': 'c', 'image': image, 'truth': square(), 'prediction': empty},
                 {'name': 'd', 'image': image, 'truth': square(), 'prediction': square(), 'dice': 0.25},
                 {'name': 'e', 'image': image, 'prediction': square()}])
    assert [text for text in written if ' ' in text or text == 'e'] == ['median · a · Dice 0.500', 'b · Dice 1.000',
                                                                         'c · Dice 0.000', 'd · Dice 0.250', 'e']
    written.clear()
    predictions([{'name': 'e', 'image': image, 'prediction': square()}])
    assert written == ['image', 'prediction', 'overlay', 'e']


def test_feature_maps_show_the_channels_that_vary_most():
    features = numpy.zeros((3, 4, 5), 'float32')
    features[0, 0] = [0, 1, 3, 2, 0]                                         # corner values: channels 2, 3 and 1 vary
    sheet = feature_maps([('stem', features)], count=3)
    bright, dark = coloured(sheet, HEAT[-1], 1), coloured(sheet, HEAT[0])
    tile = 125                                                               # 500 pixels for 4 columns
    assert bright.sum() == 3 * tile ** 2 and dark.sum() >= 3 * 11 * tile ** 2
    constant = feature_maps([('stem', features)], count=5)
    assert coloured(constant, HEAT[-1], 1).sum() == 3 * 75 ** 2              # a constant channel is dark


def test_feature_maps_put_a_skip_beside_what_it_joins():
    random = numpy.random.default_rng(0)
    stages = [('stem', random.normal(size=(24, 32, 8))), ('bottom', random.normal(size=(3, 4, 64))),
              [('skip', random.normal(size=(24, 32, 8))), ('upsampled', random.normal(size=(24, 32, 8)))],
              ('head', random.normal(size=(24, 32, 1)))]
    sheets = [feature_maps(stages[:k]) for k in range(1, 5)]
    assert len({sheet.width for sheet in sheets}) == 1 and 1000 <= sheets[0].width <= 1700
    assert feature_maps(stages[-1:]).width == sheets[0].width                # a stage of one channel takes as much room
    assert len(set(numpy.diff([sheet.height for sheet in sheets]))) == 1     # all rows are equally high
    assert (numpy.asarray(sheets[3])[-80, -60] == PAPER).all()               # one channel, the rest is white


@pytest.mark.parametrize('features', [numpy.zeros((4, 5)), numpy.full((4, 5, 2), numpy.nan)])
def test_feature_maps_refuse_what_is_no_stage(features):
    with pytest.raises(ValueError, match='stage stem'):
        feature_maps([('stem', features)])
