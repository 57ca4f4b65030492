import re

import numpy
from PIL import Image

from helpers import run_example


def test_one_layer_by_hand_agrees_with_the_library():
    done = run_example('one_layer.py')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('largest difference from the library') == 4


def test_the_tiny_u_net_learns_its_images_and_draws_them(tmp_path):
    done = run_example('tiny_unet.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r'epoch +\d+ +loss +(\S+)', done.stdout)]
    assert losses[0] == max(losses) > 0.4 and losses[-1] < -0.6
    assert numpy.asarray(Image.open(tmp_path / 'tiny_unet.png')).std() > 30 and len(list(tmp_path.iterdir())) == 1


def test_the_tiny_u_net_says_in_one_line_that_its_picture_cannot_be_written(tmp_path):
    (tmp_path / 'tiny_unet.png').mkdir()
    done = run_example('tiny_unet.py', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith('tiny_unet.py: ') and len(done.stderr.splitlines()) == 1
