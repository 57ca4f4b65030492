import csv
import io
import json
import shutil
import signal
import threading

import numpy
import pytest

import nervenet
from helpers import assert_same_run, train
from nervenet import UNet
from nervenet.images.augment import ULTRASOUND
from nervenet.images.data import Loader
from nervenet.losses import BCEWithLogitsLoss, DiceLoss
from nervenet.optim import SGD, Adam
from nervenet.study.fit import Interrupted, PlateauSchedule, WeightAverage, fit, seconds_of, stopping_on_signals
from nervenet.study.run_folder import RunFolder
from nervenet.train import evaluate, train_epoch


def test_fit_records_the_run(loaders, tmp_path):
    model, run, rows = train(loaders, tmp_path / 'run')
    assert json.loads((run.path / 'config.json').read_text()) == {'size': [16, 24], 'norm': 'batch', 'epochs': 3, 'begun': 0}
    written = list(csv.DictReader(io.StringIO((run.path / 'history.csv').read_text())))
    assert [int(row['epoch']) for row in written] == [1, 2, 3]
    assert float(written[2]['validation_dice_pooled']) == rows[2]['validation_dice_pooled']
    last, extra = nervenet.load_checkpoint(run.last)
    assert extra['epoch'] == 3 and extra['size'] == [16, 24]
    assert all(numpy.array_equal(array, last.state_dict()[name]) for name, array in model.state_dict().items())
    _, extra = nervenet.load_checkpoint(run.best)
    best = max(rows, key=lambda row: row['validation_dice_pooled'])
    assert extra['epoch'] == best['epoch'] and extra['scores']['validation_dice_pooled'] == best['validation_dice_pooled']


def test_a_seed_reproduces_a_run_bit_for_bit(loaders, tmp_path):
    states = [train(loaders, tmp_path / name, seed)[0].state_dict() for name, seed in (('a', 1), ('b', 1), ('c', 2))]
    assert all(numpy.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert any((states[0][name] != states[2][name]).any() for name in states[0])


def test_the_mean_of_the_weights_is_of_a_certain_age(rng):
    """The weights after step k are k; late ones count in proportion to k^(γ−1), whether taken in at each step or not."""
    model, share = UNet(base_channels=2, depth=1, rng=rng), 0.2
    at_each, at_some = (WeightAverage(model, share) for _ in range(2))
    for step in range(1, 2001):
        for array in model.state_dict().values():
            array[...] = step
        at_each.update(step)
        if step % 8 == 0:
            at_some.update(step)
    steps = numpy.arange(1, 2001)
    expected = (steps * numpy.diff(numpy.arange(2001.0)**4)).sum() / 2000**4
    assert expected == pytest.approx(0.8 * 2000, rel=1e-3), 'the mean age is a fifth of all steps'
    for average, tolerance in (at_each, 1e-3), (at_some, 5e-3):
        state = average.averaged.state_dict()
        assert state.keys() == model.state_dict().keys() and any('running' in name for name in state)
        for name, array in state.items():
            numpy.testing.assert_allclose(array, expected, rtol=tolerance, err_msg=name)
    for wrong in -0.1, 1.0:
        with pytest.raises(ValueError, match='share is .*; expected'):
            WeightAverage(model, wrong)


def test_what_is_scored_and_kept_is_the_mean_of_the_weights(loaders, tmp_path):
    plain, _, rows = train(loaders, tmp_path / 'plain')
    model, run, averaged_rows = train(loaders, tmp_path / 'averaged', share=0.5)
    for name, array in model.state_dict().items():
        numpy.testing.assert_array_equal(array, plain.state_dict()[name], err_msg='training itself is as without')
    last = nervenet.load(run.last)
    assert all((array != plain.state_dict()[name]).any() for name, array in last.state_dict().items() if name.endswith('weight'))
    assert [row['train_loss'] for row in rows] == [row['train_loss'] for row in averaged_rows]
    assert rows[-1]['validation_loss'] != averaged_rows[-1]['validation_loss'] == pytest.approx(
        evaluate(last, DiceLoss(), loaders[1].epoch(0))['loss'])


@pytest.mark.parametrize('share', [0, 0.3])
@pytest.mark.parametrize('norm', ['batch', None])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, loaders, norm, share):
    """Stopped in the middle of an epoch, with dropout, augmentation, sampling, a schedule and running averages on the way."""
    training, validation = loaders
    training = Loader(training.samples, training.reader, 3, seed=4, shuffle=True, positive_share=1.0 if norm else None,
                      transform=ULTRASOUND)
    whole, run, _ = train((training, validation), tmp_path / 'whole', epochs=5, norm=norm, share=share)
    for stop_after in (1, 9, 12):                         # batches, of three and two in an epoch
        folder, asked = tmp_path / f'{stop_after}', []

        def stop():
            asked.append(1)
            return len(asked) == stop_after

        with pytest.raises(Interrupted):
            train((training, validation), folder, epochs=5, norm=norm, stop=stop, share=share)
        model, resumed, rows = train((training, validation), folder, epochs=5, norm=norm, resume=True, share=share)
        assert len(rows) == 5 - (stop_after - 1) // 5 and len(resumed.history) == 5
        assert_same_run(folder, tmp_path / 'whole')
        resumed.release()


class Falling(Loader):
    """Masks all of which are foreground in the second epoch, none of it else."""

    def epoch(self, number):
        for images, masks in super().epoch(number):
            yield images, numpy.full_like(masks, number == 2)


def falling(loaders):
    """Return an inner part on which the second epoch is the best."""
    training, _ = loaders
    return Falling(training.samples[:3], training.reader, 2)


def test_inner_subjects_choose_the_best_epoch_and_when_to_stop(loaders, tmp_path):
    inner = falling(loaders)
    _, run, rows = train(loaders, tmp_path / 'run', epochs=9, inner=inner, patience=3)
    scores = [row['inner_dice_pooled'] for row in rows]
    best = int(numpy.argmax(scores)) + 1
    assert len(rows) == min(best + 3, 9) < 9, scores
    assert nervenet.load_checkpoint(run.best)[1]['epoch'] == best
    assert 'inner_dice_pooled' in nervenet.load_checkpoint(run.best)[1]['scores']
    run.release()
    assert train(loaders, tmp_path / 'run', epochs=9, inner=inner, patience=3, resume=True)[2] == [], 'a stopped run stays stopped'
    text = run.summarize({'empty mask': {name: 0.5 for name in ('dice_pooled', 'dice_per_image', 'iou_pooled', 'accuracy')}},
                         {key: dict.fromkeys(('dice_pooled', 'dice_per_image', 'iou_pooled', 'iou_per_image', 'accuracy'), score)
                          for key, score in (('validation', 0.25), ('flip average', 0.75))})
    assert f'after the epoch that was best on the inner subjects: {best}' in text
    assert f'[{rows[best - 1]["validation_loss"]:.4f}]' in text
    assert 'as chosen on the inner subjects, settings.json\n\naccuracies: [0.2500]' in text
    assert 'averaged with that of the mirrored image\n\naccuracies: [0.7500]' in text


def test_a_run_that_diverges_names_epoch_part_and_what_is_kept(loaders, tmp_path):
    model = UNet(base_channels=2, depth=1, norm=None, rng=numpy.random.default_rng(0))
    run = RunFolder(tmp_path / 'run', {'size': [16, 24]})
    with pytest.raises(FloatingPointError, match=r'epoch 1, (training|validation): the l.* at batch') as error:
        list(fit(model, BCEWithLogitsLoss(), SGD(model.parameters(), 1e30), *loaders, 2, run))
    assert 'last good epoch' not in str(error.value), 'there is none yet'
    model.head.params['bias'][:] = 0
    run.history.append({'epoch': 1})
    model.stem.children['conv1'].params['weight'][:] = numpy.nan
    with pytest.raises(FloatingPointError, match='The last good epoch is in .*last.npz'):
        list(fit(model, BCEWithLogitsLoss(), SGD(model.parameters(), 0.1), *loaders, 2, run))


def test_the_first_signal_asks_to_stop_and_the_second_stops(capfd, usual_interrupt):
    with pytest.raises(KeyboardInterrupt):
        with stopping_on_signals() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop() and 'once more to stop at once' in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop() and signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_training_goes_on_and_signals_stay_as_they_were(loaders, tmp_path):
    handlers, rows = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []

    def work():
        with stopping_on_signals() as stop:
            rows.extend(train(loaders, tmp_path / 'run', epochs=1, stop=stop)[2])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [row['epoch'] for row in rows] == [1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_signal_handlers_are_put_back_when_training_ends_and_when_it_fails():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping_on_signals():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != handlers
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(ZeroDivisionError), stopping_on_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_epochs_are_counted_from_one_and_that_number_decides_the_order(loaders, tmp_path):
    asked = []

    class Watched(Loader):
        def epoch(self, number):
            asked.append(number)
            return super().epoch(number)

    for loader in loaders:
        loader.__class__ = Watched
    train(loaders, tmp_path / 'run', epochs=2)
    assert asked == [1, 1, 2, 2]


def test_more_epochs_are_a_run_of_their_own_that_starts_from_the_network(loaders, tmp_path):
    """The optimizer begins anew, patience counts from there, and a stop on the way changes nothing."""
    training, validation = loaders
    _, first, _ = train(loaders, tmp_path / 'whole', epochs=2)
    first.finish_model_file(first.last)
    first.write('summary.txt', 'of two epochs')
    first.release()
    shutil.copytree(tmp_path / 'whole', tmp_path / 'stopped')
    with pytest.raises(ValueError, match='epochs is 2 there and 1 now'):
        train(loaders, tmp_path / 'whole', epochs=1, resume=True)
    model, whole, rows = train(loaders, tmp_path / 'whole', epochs=5, resume=True)
    assert [row['epoch'] for row in rows] == [3, 4, 5] and whole.begun == 2 and not (whole.path / 'summary.txt').exists()
    assert [row['learning_rate'] for row in rows] == [row['learning_rate'] for row in first.history + rows][:2] + [0.01 / 9]

    start = nervenet.load(tmp_path / 'stopped' / 'last.npz')
    start.dropout.rng = numpy.random.default_rng()
    start.dropout.rng.bit_generator.state = UNet(base_channels=3, depth=2, norm='batch', dropout=0.1,
                                                 rng=numpy.random.default_rng(1)).dropout.rng.bit_generator.state
    optimizer = Adam(start.parameters(), 0.01)
    for epoch in 3, 4, 5:
        train_epoch(start, DiceLoss(), optimizer, training.epoch(epoch), lambda step: 0.01 / (1 + step))
    assert all(numpy.array_equal(array, start.state_dict()[name]) for name, array in model.state_dict().items())

    asked = []
    with pytest.raises(Interrupted):
        train(loaders, tmp_path / 'stopped', epochs=5, resume=True, stop=lambda: asked.append(1) or len(asked) == 6)
    with pytest.raises(ValueError, match='epochs is 5 there and 9 now'):
        train(loaders, tmp_path / 'stopped', epochs=9, resume=True)     # it has not come to its end
    _, stopped, rows = train(loaders, tmp_path / 'stopped', epochs=5, resume=True)
    assert stopped.begun == 2 and len(rows) == 2
    assert_same_run(tmp_path / 'stopped', tmp_path / 'whole')


def test_patience_counts_from_where_more_epochs_began(loaders, tmp_path):
    _, run, rows = train(loaders, tmp_path / 'run', epochs=9, inner=falling(loaders), patience=1)
    ended = len(rows)
    assert ended < 9
    run.finish_model_file(run.last)
    run.release()
    _, run, rows = train(loaders, tmp_path / 'run', epochs=12, inner=falling(loaders), patience=1, resume=True)
    assert run.begun == ended and len(rows) == 1, 'one more epoch that is no better'


def test_the_rate_falls_each_time_that_the_loss_of_the_inner_subjects_has_not_fallen_for_a_while():
    losses = [3, 2, 2.5, 2, 2.1, 1.9, 1.8, 1.9, 1.9, 1.8, 1.7, 1.7, 1.8, 1.9, 2, 2, 2]
    history, rates = [], []
    schedule = PlateauSchedule(0.1, history, warmup_steps=4, factor=0.5, patience=3)
    for loss in losses:
        rates.append(schedule(100))
        history.append({'inner_loss': loss})
    # After 2.1 three epochs have not been below 2; after the second 1.9 and 1.8 three not below 1.8; then after 1.9, and three later.
    assert rates == pytest.approx([0.1] * 5 + [0.05] * 5 + [0.025] * 4 + [0.0125] * 3)
    assert schedule(1) == pytest.approx(0.05 * 0.0625), 'the warm-up goes on beneath'
    assert PlateauSchedule(0.1, history, patience=3, begun=len(history))(0) == 0.1, 'epochs that are added have a schedule of their own'


def test_the_time_that_is_told_is_that_of_steps(rng, monkeypatch):
    """Of three steps of 9, 1 and 2 seconds the last counts; a third of it is what scoring as many images takes."""
    clock, model = iter([0, 9, 10, 11, 20, 22]), UNet(base_channels=2, depth=1, rng=rng)
    monkeypatch.setattr('nervenet.study.fit.time.perf_counter', lambda: next(clock))
    seconds = seconds_of(model, DiceLoss(), Adam(model.parameters(), 0.01), (4, 16, 24, 1), 101, 12)
    assert seconds == pytest.approx(2 * 101 + 2 * 3 / 3) and next(clock, None) is None
