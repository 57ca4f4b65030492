import contextlib
from pathlib import Path

import pytest

from nervenet import CheckpointError, UNet, save
from nervenet.images.augment import ULTRASOUND
from nervenet.study import options
from nervenet.networks import NETWORKS
from nervenet.study.options import architecture, augmentation, check_memory, default_epochs, options_to_store, parse


def test_scans_are_augmented_and_endless_synthetic_images_are_not(tmp_path):
    assert (parse([]).augment, default_epochs(parse([]), 1000)) == ('none', 5)
    assert parse(['--data', str(tmp_path)]).augment == 'default'
    given = parse(['--data', str(tmp_path), '--augment', 'none', '--epochs', '3'])
    assert (given.augment, given.epochs) == ('none', 3)


@pytest.mark.parametrize('images, options, epochs', [
    (1940, ['--folds', '5'], 15), (1940, [], 15), (5635, ['--folds', '5'], 15), (240, ['--folds', '5'], 125), (240, ['--batch-size', '4'], 62),
    (240, ['--test', '.'], 100), (240, ['--inner-share', '0.5'], 200), (20, [], 200), (640, ['--validation-share', '0.5'], 75)])
def test_small_sets_get_as_many_steps_as_large_ones(tmp_path, images, options, epochs):
    assert default_epochs(parse(['--data', str(tmp_path), *options]), images) == epochs


def test_single_options_replace_those_of_the_recipe():
    assert augmentation(parse(['--augment', 'default'])) == ULTRASOUND
    changed = augmentation(parse(['--augment', 'default', '--zoom-range', '0.25', '--no-horizontal-flip', '--fill-mode', 'nearest']))
    assert (changed.zoom_range, changed.horizontal_flip, changed.fill_mode) == (0.25, False, 'nearest')
    assert changed.rotation_range == ULTRASOUND.rotation_range


def refused(capsys, *arguments):
    """Return the one line with which `parse` refuses the arguments."""
    with pytest.raises(SystemExit):
        parse([*map(str, arguments)])
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('text', ['1.5', '1', '-0.1', 'nan', 'x'])
def test_a_dropout_out_of_range_is_refused_as_it_is_typed(text, capsys):
    assert f'{text!r} is not a number from 0 up to' in refused(capsys, f'--dropout={text}')
    assert parse(['--dropout', '0.999']).dropout == 0.999 and parse([]).dropout == 0


def test_a_network_to_start_from_decides_the_architecture_and_contradictions_are_refused(tmp_path, capsys):
    save(tmp_path / 'm.npz', UNet(base_channels=3, depth=2, norm=None))
    args = parse(['--init', str(tmp_path / 'm.npz'), '--size', '30x42'])
    assert (args.base_channels, args.depth, args.norm, args.size) == (3, 2, None, (32, 44))
    assert options_to_store(args)['init'] == str(tmp_path / 'm.npz')
    parse(['--init', str(tmp_path / 'm.npz'), '--base-channels', '3', '--norm', 'none'])
    for option, value, here in ('--base-channels', 16, 3), ('--depth', 4, 2), ('--norm', 'batch', 'none'):
        said = refused(capsys, '--init', tmp_path / 'm.npz', option, value)
        assert f'{option} is {value}, but the network in {tmp_path / "m.npz"} has {here}; leave out {option}' in said
    save(tmp_path / 'o.npz', NETWORKS['optimised-resunet'](base_channels=2, depth=1))
    said = refused(capsys, '--init', tmp_path / 'o.npz', '--no-dac')
    assert f'--no-dac is given, but the network in {tmp_path / "o.npz"} has that part; leave out --no-dac' in said
    save(tmp_path / 'm.npz', UNet(out_channels=3, base_channels=3, depth=2))
    with pytest.raises(CheckpointError, match='expected a network for grey images and one kind of mask'):
        parse(['--init', str(tmp_path / 'm.npz')])
    with pytest.raises(CheckpointError, match='x.npz: no such file'):
        parse(['--init', str(tmp_path / 'x.npz')])


@pytest.mark.parametrize('arguments, message', [
    (['--size', '99999x99999'], r'a training step on 8 images of 100000x100000 with --base-channels 16 and --depth 4 needs about'),
    (['--base-channels', '100000', '--depth', '12'], r'images of 4096x4096 with --base-channels 100000 and --depth 12 needs about'),
    (['--batch-size', '10000000'], 'a training step on 10000000 images')])
def test_training_that_takes_more_memory_than_there_is_is_refused_with_both_numbers(arguments, message, monkeypatch):
    monkeypatch.setattr(options, 'available_bytes', lambda: 8 * 2**30)
    args = parse(arguments)
    args.device = 'cpu'
    with pytest.raises(MemoryError, match=message + r'.* GiB, and 8\.0 GiB are free'):
        check_memory(args)


def test_training_that_fits_is_let_through_and_so_is_all_where_nobody_knows(monkeypatch):
    args = parse(['--size', '99999x99999', '--batch-size', '1', '--base-channels', '1', '--depth', '1'])
    args.device = 'cpu'
    needed = options.training_bytes(args, 1)
    assert needed > 4 * 8 * 10**10
    for there, fits in (needed, True), (needed - 1, False), (None, True):
        monkeypatch.setattr(options, 'available_bytes', lambda: there)
        with contextlib.nullcontext() if fits else pytest.raises(MemoryError):
            check_memory(args)
    args.device = 'gpu'
    assert options.training_bytes(args, 1) == 4 * 8 * 10**10, 'the network is on the device, the batches come from here'


def test_processes_of_one_machine_need_their_shares_of_a_batch_together(monkeypatch):
    class Three:
        size, neighbours = 3, 2

    args = parse(['--size', '320x320', '--batch-size', '7'])
    args.device = 'cpu'
    share = options.training_bytes(args, 3)                             # of 7 images among three, at most
    assert share < options.training_bytes(args, 7) * 0.6
    monkeypatch.setattr(options, 'available_bytes', lambda: 2 * share)
    check_memory(args, Three)
    monkeypatch.setattr(options, 'available_bytes', lambda: 2 * share - 1)
    with pytest.raises(MemoryError, match=r'GiB in each of 2 processes, and .* are free'):
        check_memory(args, Three)


@pytest.mark.skipif(not Path('/proc/meminfo').exists(), reason='needs Linux')
def test_available_memory_is_free_memory_and_swap_within_the_limit_of_a_container(monkeypatch):
    files = {'/proc/meminfo': 'MemTotal: 9 kB\nMemAvailable:   4000 kB\nSwapFree: 1000 kB\n'}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, 'read_text', read_text)
    assert options.available_bytes() == 5000 * 1024
    files['/sys/fs/cgroup/memory.max'] = 'max\n'
    assert options.available_bytes() == 5000 * 1024
    files['/sys/fs/cgroup/memory.max'] = '1000000\n'
    assert options.available_bytes() == 1000000
    del files['/proc/meminfo']
    assert options.available_bytes() is None


def test_each_network_has_a_depth_of_its_own_and_parts_that_others_have_not(capsys):
    depths = {'unet': 4, 'resunet': 4, 'resnet': 3, 'refinenet': 4, 'optimised-resunet': 3}
    assert depths.items() <= {name: parse(['--model', name]).depth for name in NETWORKS}.items()
    assert parse(['--model', 'resnet', '--depth', '2']).depth == 2
    for name, network in NETWORKS.items():
        args = parse(['--model', name, '--base-channels', '2', '--depth', '2', '--norm', 'none', '--dropout', '0.1'])
        model = network(**architecture(args))
        assert all(model.config[key] == value for key, value in architecture(args).items()) and model.config['norm'] is None
    assert architecture(parse(['--model', 'optimised-resunet', '--no-rmp']))['rmp'] is False
    for name in 'unet', 'resunet', 'resnet', 'refinenet':
        assert f'--no-dac has no meaning with --model {name}' in refused(capsys, '--model', name, '--no-dac')
    assert "invalid choice: 'vnet'" in refused(capsys, '--model', 'vnet')


def test_the_recipe_is_what_readme_measured(tmp_path):
    args = parse([])
    assert (args.optimizer, args.learning_rate, args.schedule, args.average_weights, args.batch_size) == ('adam', 0.002, 'constant', 0.1, 8)


def test_an_average_in_which_early_steps_count_more_is_refused(capsys):
    assert parse(['--average-weights', '0.5']).average_weights == 0.5 and parse(['--average-weights', '0']).average_weights == 0
    with pytest.raises(SystemExit):
        parse(['--average-weights', '0.6'])
    assert "'0.6' is not a number from 0 to 0.5: beyond, early steps would count more than late ones" in capsys.readouterr().err
