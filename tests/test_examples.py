from helpers import run_example


def test_one_layer_by_hand_agrees_with_the_library():
    done = run_example(name='one_layer.py')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('largest difference from the library') == 4
