"""Look inside a trained network: what every stage makes of one image, and what one output pixel depends on.

    python examples/look_inside.py --model RUN/best.npz --image FILE --output FOLDER

Writes stages.png, what each stage sees on the way down, at the bottom and on the way up; joins.png, each skip (*where*) beside
the map from below that it meets (*what*); and depends.png, the receptive field of one output pixel and the gradient of its logit
with respect to every input pixel.
"""

import argparse
import sys
from pathlib import Path

import numpy

from nervenet.study import figures
from nervenet.files import make_folder, refuse_content
from nervenet.images.reading import read_image
from nervenet.images.samples import DataError
from nervenet.layers import forwards_replaced, sigmoid
from nervenet.study.report import print_whatever_comes
from nervenet.study.segment import Segmenter


def main(arguments=None):
    args = parse(arguments)
    segmenter, _ = Segmenter.from_file(args.model)
    model, size = segmenter.model, segmenter.size
    image = segmenter.prepare(read_image(args.image))                        # (H, W), intensities in [0, 1]
    x = image[None, :, :, None].astype(model.dtype)

    # Inference, but keeping what backward needs: which pixels does a trained network's answer depend on?
    model.eval(keep_cache=True)
    stages, joined = {}, {}
    with forwards_replaced(model, lambda name, layer, forward: remembering(joined, layer, forward)):
        logits = model.forward(x, observe=stages.__setitem__)
    probability = sigmoid(logits)[0, :, :, 0]
    row, column = args.pixel or numpy.unravel_index(probability.argmax(), size)
    if not (0 <= row < size[0] and 0 <= column < size[1]):
        raise DataError(f'--pixel {row},{column} lies outside the image, which the network sees at {size[0]}x{size[1]}')
    dlogits = numpy.zeros_like(logits)
    dlogits[0, row, column, 0] = 1                                           # L = the logit of this one pixel
    dimage = model.backward(dlogits)[0, :, :, 0]                             # ∂L/∂(every input pixel)

    refuse_content(args.output, '--output')
    make_folder(args.output, '--output')
    del stages['head']                                                       # the logits, which depends.png shows
    bottom = min(stages, key=lambda name: stages[name].shape[1])             # of equals, the first
    figures.save(figures.feature_maps([(f'{name}, the bottom' if name == bottom else name, y[0]) for name, y in stages.items()],
                                      title=f'What every stage of the {type(model).__name__} sees'), args.output / 'stages.png')
    joins = [[(f'{name}: the skip knows where', where[0]), (f'{name}: the map from below knows what', what[0])]
             for name, layer in model.joins().items() for where, what in [joined[layer]]]
    if joins:                                                                # one that is halved only once may have none
        figures.save(figures.feature_maps(joins, title='Each skip beside the map from below that it meets'), args.output / 'joins.png')

    rows, columns = (model.receptive_field('head', int(place), axis, size) for axis, place in enumerate((row, column)))
    field = rows[0], columns[0], rows[1] - rows[0] + 1, columns[1] - columns[0] + 1
    pixel = row - 1, column - 1, 3, 3
    shown = [figures.overlay(image, probability > 0.5), figures.heat(image, abs(dimage))]
    shown = [figures.rectangle(figures.rectangle(picture, field, size, figures.SKY), pixel, size, figures.VERMILLION) for picture in shown]
    figures.save(figures.grid([shown], column_titles=['prediction, and the receptive field of one pixel', 'gradient of its logit with respect to the image'],
                 title=f'What output pixel ({row}, {column}) depends on'), args.output / 'depends.png')
    print(f'pixel ({row}, {column}): probability {probability[row, column]:.3f}, receptive field {field[2]}x{field[3]} pixels')
    print(f'{"stages.png, joins.png" if joins else "stages.png"} and depends.png are in {args.output}')


def remembering(joined, layer, forward):
    """Return a forward that puts what it is given into `joined`, under the layer."""
    def function(*inputs, **options):
        joined[layer] = inputs
        return forward(*inputs, **options)
    return function


def parse(arguments):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split('\n')[0])
    parser.add_argument('--model', type=Path, required=True, metavar='FILE', help='model file, such as RUN/best.npz')
    parser.add_argument('--image', type=Path, required=True, metavar='FILE', help='image to look at')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='folder for the three pictures')
    parser.add_argument('--pixel', type=pixel, metavar='ROW,COLUMN',
                        help='output pixel to explain, at network size, counted from 0; default: the most probable one')
    return parser.parse_args(arguments)


def pixel(text):
    row, comma, column = text.partition(',')
    if not (comma and row.isdigit() and column.isdigit()):
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form ROW,COLUMN, such as 48,64')
    return int(row), int(column)


if __name__ == '__main__':
    print_whatever_comes()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, MemoryError, OverflowError) as error:
        sys.exit(f'look_inside.py: {error}')
