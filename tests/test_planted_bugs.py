"""The suite is checked: each bug planted here, in a copy of the source, must make a check fail that passes without it.

To add one: name it, say which text of which file becomes what, and which check sees it. The check runs once on the code as it is and
once with the bug in place, so it must be cheap.
"""

import contextlib
import copy
import io
import json
import os
import signal
import threading
from pathlib import Path

import numpy
import pytest

import nervenet
from helpers import SAMPLES, Made, changed, example, planted, train
from nervenet import DiceLoss, UNet
from nervenet.files import atomic_write
from nervenet.images.data import Loader
from nervenet.optim import SGD
from nervenet.study import claims, kfold, options, report, run_folder
from nervenet.study.fit import Interrupted, fit, stopping_on_signals
from nervenet.study.run_folder import RunFolder
from nervenet.train import train_epoch, train_step
from test_method import check_method

BUGS = {}                       # name → (file, text, what becomes of it, check)


def bug(name, file, text, becomes, check):
    assert name not in BUGS
    BUGS[name] = file, text, becomes, check


def main_job(source=None):
    """Return a function that calls the main job, of examples/train_unet.py or of another source, without its pictures."""
    module = example('train_unet')
    if source:
        exec(compile(source, 'train_unet.py', 'exec'), vars(module))
    module.draw_run = module.draw_learning = module.write_page = lambda *args: None

    def call(*arguments):
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(list(map(str, arguments)))
    call.module = module
    return call


# --- What the checks work with

def loaders():
    return Loader(SAMPLES[:5], Made(), 2, seed=1, shuffle=True), Loader(SAMPLES[5:], Made(), 2)


class Spy:
    """Records under its name what each call of a function of a module was given, or what `seen` makes of it."""

    def __init__(self, patch, owner, name, calls, seen=lambda *args: args):
        original = getattr(owner, name)

        def function(*args, **kwargs):
            calls.append((name, seen(*args)))
            return original(*args, **kwargs)
        patch.setattr(owner, name, function)


# --- Checks: each takes a new folder and the main job, and fails by an assertion: a bug that merely ends in another error is no test

def check_content_is_on_the_disk_before_it_gets_its_name(folder, job):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        Spy(patch, os, 'fsync', calls, lambda file: os.fstat(file).st_size if os.path.isfile(f'/proc/self/fd/{file}') else 'folder')
        Spy(patch, os, 'replace', calls, lambda source, target: Path(target).name)
        with atomic_write(folder / 'text') as file:
            file.write(b'ten bytes.')
            assert not (folder / 'text').exists()
    assert calls == [('fsync', 10), ('replace', 'text'), ('fsync', 'folder')]


def check_no_file_is_ever_half_written(folder, job):
    """When the last step of writing fails, the old content is there, whoever writes."""
    def fail(*args):
        raise OSError('full')

    run = RunFolder(folder / 'run', {})
    whole = kfold.CrossValidation(folder / 'cv', {}, lambda path: path.write_text('{}'))
    writers = [(run.path / 'history.csv', lambda: run.write('history.csv', 'new')),
               (run.path / 'config.json', lambda: run_folder.write_config(run.path / 'config.json', {'new': 1})),
               (run.path / 'last.npz', lambda: nervenet.save(run.path / 'last.npz', UNet(base_channels=1, depth=1))),
               (whole.split, lambda: kfold.write_split(whole.split, SAMPLES, [True] * 8, [['0', '1', '2', '3'], ['4', '5', '6', '7']]))]
    for path, write in writers:
        path.write_text('old')
        with pytest.MonkeyPatch.context() as patch, pytest.raises((OSError, nervenet.CheckpointError)):
            patch.setattr(os, 'replace', fail)
            write()
        assert path.read_text() == 'old' and not path.with_name(path.name + '.partial').exists(), path.name
        write()
        assert path.read_bytes() != b'old', path.name


def check_records_follow_the_network(folder, job):
    """last.npz, the only truth, is written first; then come best.npz and a row of history.csv for each epoch."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        Spy(patch, os, 'replace', calls, lambda source, target: Path(target).name)
        _, run, rows = train(loaders(), folder / 'run', epochs=2)
    names = [name for _, name in calls]
    assert names[:2] == ['config.json', 'last.npz'] and names[-1] == 'history.csv' and names.count('last.npz') == 2
    assert all(names[i - 1] in ('last.npz', 'best.npz') for i, name in enumerate(names) if name == 'history.csv')
    assert len((run.path / 'history.csv').read_text().splitlines()) == 3
    assert nervenet.load_checkpoint(run.best)[1]['epoch'] == report.best_row(rows)['epoch']


def check_the_best_file_is_that_of_the_best_epoch(folder, job):
    run = RunFolder(folder / 'run', {'size': [8, 12]})
    model = UNet(base_channels=1, depth=1)
    for epoch, dice in (1, 0.2), (2, 0.5), (3, 0.4):
        run.record({'epoch': epoch, 'validation_dice_pooled': dice, 'validation_loss': 1.0}, model, SGD(model.parameters(), 0.1))
    assert [nervenet.load_checkpoint(path)[1]['epoch'] for path in (run.last, run.best)] == [3, 2]


def check_a_resumed_run_goes_on_bit_for_bit(folder, job):
    whole = train(loaders(), folder / 'whole', epochs=3)[0].state_dict()
    with pytest.raises(Interrupted):
        train(loaders(), folder / 'run', epochs=3, stop=iter([False] * 8 + [True]).__next__)
    model, run, rows = train(loaders(), folder / 'run', epochs=3, resume=True)
    assert len(rows) == 2 and [row['epoch'] for row in run.history] == [1, 2, 3]
    assert all(numpy.array_equal(array, whole[name]) for name, array in model.state_dict().items())


def check_the_step_is_as_long_as_the_clipped_gradient(folder, job):
    model = UNet(base_channels=2, depth=1, rng=numpy.random.default_rng(0))
    before = {name: array.astype(float) for name, array in model.parameters().items()}
    x = numpy.random.default_rng(1).random((2, 8, 8, 1), dtype='float32')
    train_step(model, DiceLoss(), SGD(model.parameters(), 1.0), x, (x > 0.5).astype('float32'), max_norm=1e-3)
    assert sum(((array - before[name])**2).sum() for name, array in model.parameters().items())**0.5 == pytest.approx(1e-3, rel=1e-2)


def check_fit_hands_on_norm_and_schedule(folder, job):
    """The rate of step k is schedule(k), from 0; both parts of fit's promise hold in the first epoch."""
    model = UNet(base_channels=2, depth=1, rng=numpy.random.default_rng(0))
    optimizer, rates, asked = SGD(model.parameters(), 5.0), [], []
    step = optimizer.step
    optimizer.step = lambda gradients: (rates.append(optimizer.learning_rate), step(gradients))
    before = {name: array.copy() for name, array in model.parameters().items()}

    def schedule(number):
        asked.append(number)
        return 0.1 / (1 + number)

    list(fit(model, DiceLoss(), optimizer, *loaders(), 1, RunFolder(folder / 'run', {'size': [8, 12]}), schedule, max_norm=1e-6))
    assert asked == [0, 1, 2] and rates == [0.1, 0.05, 0.1 / 3]
    assert max(abs(array - before[name]).max() for name, array in model.parameters().items()) < 1e-6


def check_epochs_count_from_one(folder, job):
    asked, parts = [], loaders()
    for loader in parts:
        loader.epoch = lambda number, epoch=loader.epoch: asked.append(number) or epoch(number)
    train(parts, folder / 'run', epochs=2)
    assert asked == [1, 1, 2, 2]


def check_a_bad_batch_draws_nothing(folder, job):
    model = UNet(base_channels=2, depth=1, dropout=0.5, rng=numpy.random.default_rng(0))
    state = copy.deepcopy(model.dropout.rng.bit_generator.state)
    x = numpy.full((1, 8, 8, 1), numpy.nan, 'float32')
    with pytest.raises(FloatingPointError):
        train_epoch(model, DiceLoss(), SGD(model.parameters(), 0.1), [(x, numpy.zeros_like(x))])
    assert model.dropout.rng.bit_generator.state == state


def check_signals_are_given_back(folder, job):
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    try:
        with stopping_on_signals() as stop:
            assert not stop() and [signal.getsignal(number) for number in numbers] != before
        assert [signal.getsignal(number) for number in numbers] == before
        with pytest.MonkeyPatch.context() as patch, stopping_on_signals() as stop:
            patch.setattr(os, 'write', lambda *args: None)
            signal.raise_signal(signal.SIGTERM)
            assert stop() and [signal.getsignal(number) for number in numbers] == before, 'the second time they do what they did'
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    failed = []

    def work():
        try:
            with stopping_on_signals() as stop:
                assert not stop()
        except ValueError as error:
            failed.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def made_row(epoch, value, **parts):
    names = 'accuracy', 'loss', 'iou_pooled', 'iou_per_image', 'soft_dice_pooled', 'soft_dice_per_image', 'dice_pooled', 'dice_per_image'
    row = {'epoch': epoch} | {f'{part}_{name}': value for part in ('train', 'validation') for name in names}
    return row | {f'{part}_{name}': score for part, score in parts.items() for name in names}


def check_summaries_are_of_the_last_epoch_and_of_all_folds(folder, job):
    scores = [dict.fromkeys(('accuracy', 'iou_pooled', 'iou_per_image', 'dice_pooled', 'dice_per_image'), value) for value in (0.1, 0.4, 0.9)]
    histories = [[made_row(1, 0.9), made_row(2, value)] for value in (0.25, 0.5, 0.6)]
    chosen = [{'flip average': scores[0]}, {'flip average': scores[1]}, {'flip average': scores[2]}]
    text = report.summaries(histories, [{'empty mask': each} for each in scores], chosen, 'first of all')
    assert text.startswith('first of all\n') and 'hard dice: [0.2500, 0.5000, 0.6000]' in text
    assert 'average hard dice: 0.4500 ± 0.1472' in text and 'population' in text
    assert 'empty mask: hard dice 0.4667 ± 0.3300' in text and 'average accuracies: 0.4667 ± 0.3300' in text
    assert report.summaries(histories, [{'empty mask': each} for each in scores], [*chosen[:2], {}]).count('average hard dice:') == 1
    inner = [[made_row(1, 0.3, inner=0.9), made_row(2, 0.7, inner=0.2)]]
    assert 'best on the inner subjects: 1\n\naccuracies: [0.3000]' in report.summaries(inner, [{'empty mask': scores[0]}], [{}])


def check_the_best_epoch(folder, job):
    def best(*rows):
        return report.best_row(list(rows))['epoch']

    def row(epoch, dice, loss, share=0.1):
        return {'epoch': epoch, 'validation_dice_pooled': dice, 'validation_loss': loss, 'validation_true_foreground_share': share}

    assert best(row(1, 0, 0.7), row(2, 0, 0.5), row(3, 0, 0.6)) == 2 and best(row(1, 0.2, 0.5), row(2, 0.2, 0.5)) == 2
    assert best(row(1, 1, 0.9, 0), row(2, 0, 0.1, 0)) == 2 and best(row(1, 0.3, 0.9), row(2, 0.2, 0.1)) == 1


def check_a_cross_validation_sums_up_all_its_folds(folder, job):
    drawn, scores = [], dict.fromkeys(('accuracy', 'iou_pooled', 'iou_per_image', 'dice_pooled', 'dice_per_image'), 0)
    whole = kfold.CrossValidation(folder / 'cv', {'folds': 3}, lambda path: path.write_text('{}'))
    for number, value in enumerate((0.25, 0.5, 0.75), 1):
        fold = whole.fold(number)
        fold.mkdir()
        rows = [made_row(epoch, value * epoch, train=value) | {f'{part}_foreground_share': 0.1 for part in ('train', 'validation')}
                for epoch in (1, 2)]
        text = '\n'.join(','.join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
        (fold / 'history.csv').write_text(text + '\n')
        (fold / 'config.json').write_text(json.dumps({'baselines': {'empty mask': {name: value for name in scores}}}))
        (fold / 'settings.json').write_text(json.dumps({'last.npz': {}}))
        (fold / 'summary.txt').write_text('done')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kfold.figures, 'fold_curves', lambda histories, baselines, title: drawn.append((histories, baselines, title)))
        patch.setattr(kfold.figures, 'save', lambda picture, path: None)
        text = whole.summarize(3)
        (histories, baselines, title), = drawn
        assert 'hard dice: [0.5000, 1.0000, 1.5000]' in text and text.startswith('3 of 3 folds\n')
        assert baselines == {'empty mask': pytest.approx(dict.fromkeys(scores, 0.5))} and [len(each) for each in histories] == [2, 2, 2]
        (whole.fold(2) / 'summary.txt').unlink()
        assert whole.summarize(3).startswith('2 of 3 folds; not complete yet: 2\n')


def check_a_seed_of_its_own_deals_otherwise(folder, job):
    dealt = []
    job.module.train = lambda args, path, reader, training, validation, note: dealt.append({sample.subject for sample in validation})
    job.module.holds_foreground = lambda samples, reader: numpy.ones(len(samples), bool)
    job.module.noted = lambda args, samples, reader, note: note
    for seed in range(4):
        job('--size', '16x16', '--device', 'cpu', '--out', folder / str(seed), '--seed', seed)
    assert len(set(map(frozenset, dealt))) == 4


def check_a_folder_of_another_machine_is_refused_until_that_is_silent(folder, job):
    (folder / 'used').mkdir()
    file = folder / 'used' / 'claim_elsewhere_7_1'
    file.write_text(json.dumps({'host': 'elsewhere', 'process': os.getpid()}))
    with pytest.raises(BlockingIOError):
        claims.claim(folder / 'used')
    assert claims.claims_in(folder / 'used') == [file.name]
    os.utime(file, (1, 1))
    assert not claims.is_alive(file, 10**6)
    claims.claim(folder / 'used')()
    assert claims.claims_in(folder / 'used') == []


def check_too_much_memory_is_refused(folder, job):
    args = options.parse(['--size', '320x320'])
    args.device = 'cpu'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, 'available_bytes', lambda: 2**26)
        with pytest.raises(MemoryError, match='GiB are free'):
            options.check_memory(args)


# --- The register

TRAIN, FILES, FIT, RUN, REPORT, KFOLD, OPTIONS, STEP, CLAIMS = (
    'examples/train_unet.py', 'nervenet/files.py', 'nervenet/study/fit.py', 'nervenet/study/run_folder.py', 'nervenet/study/report.py',
    'nervenet/study/kfold.py', 'nervenet/study/options.py', 'nervenet/train.py', 'nervenet/study/claims.py')

bug('the baseline is the mean of all masks', TRAIN, "for _, masks in in_order['training'].epoch(0):",
    'for _, masks in [batch for each in in_order.values() for batch in each.epoch(0)]:', check_method)
bug('intensities are those of all images', TRAIN, "intensity_statistics(parts['training'], reader)",
    'intensity_statistics(sum(parts.values(), []), reader)', check_method)
bug('validation is augmented', TRAIN, 'args.batch_size, device=args.device, rows=processes.rows) for',
    'args.batch_size, device=args.device, transform=augmentation(args)) for', check_method)
bug('training is not augmented', TRAIN, 'transform=augmentation(args), device', 'transform=None, device', check_method)
bug('training is not shuffled', TRAIN, 'shuffle=True', 'shuffle=False', check_method)
bug('the weights have a fixed seed', TRAIN, 'rng = numpy.random.default_rng(args.seed)', 'rng = numpy.random.default_rng(0)', check_method)
bug('the order has a fixed seed', TRAIN, 'args.batch_size, seed=args.seed', 'args.batch_size, seed=0', check_method)
bug('the split has a fixed seed', TRAIN, 'args.validation_share, args.seed, positive, 2', 'args.validation_share, 0, positive, 2',
    check_a_seed_of_its_own_deals_otherwise)
bug('the bound on the gradient is not handed on', TRAIN, 'schedule, args.clip_norm,', 'schedule, None,', check_method)
bug('the cosine ends after one epoch', TRAIN, 'steps = (args.epochs - run.begun) * len(training)', 'steps = len(training)', check_method)
bug('the best epoch is chosen on validation', TRAIN, "scored.get('inner'), args.patience", 'None, args.patience', check_method)
bug('settings are chosen on validation', TRAIN, 'args.device, validation, inner,', 'args.device, validation, None,', check_method)
bug('settings are chosen on validation although there are inner subjects', RUN, "if inner is None else (inner, 'inner')",
    "if inner is None else (validation, 'inner')", check_method)
bug('the honest score is computed on the inner subjects', RUN, "['validation'] = score(network, validation.epoch(0)",
    "['validation'] = score(network, part.epoch(0)", check_method)
bug('the average over flips is none', RUN, 'score(network, validation.epoch(0), Settings(flip_average=True))', 'score(network, validation.epoch(0), Settings())', check_method)

bug('content is not flushed before it is synchronised', FILES, '            file.flush()\n', '',
    check_content_is_on_the_disk_before_it_gets_its_name)
bug('content is not synchronised', FILES, 'os.fsync(file.fileno())', 'file.fileno()', check_content_is_on_the_disk_before_it_gets_its_name)
bug('the new name is not synchronised', FILES, 'os.fsync(folder)', 'os.fstat(folder)', check_content_is_on_the_disk_before_it_gets_its_name)
bug('content is written under its name', FILES, "path.with_name(path.name + '.partial')", 'path',
    check_content_is_on_the_disk_before_it_gets_its_name)
bug('half a file stays when writing fails', FILES, 'partial.unlink(missing_ok=True)', 'partial.exists()', check_no_file_is_ever_half_written)
bug('text is not written whole', RUN, 'with atomic_write(self.path / name) as file', "with open(self.path / name, 'wb') as file",
    check_no_file_is_ever_half_written)
bug('the config is not written whole', RUN, 'with atomic_write(path) as file', "with open(path, 'wb') as file",
    check_no_file_is_ever_half_written)
bug('the split is not written whole', KFOLD, 'with atomic_write(path) as file', "with open(path, 'wb') as file",
    check_no_file_is_ever_half_written)
bug('records come before the network', RUN, '        self.history.append(row)\n        self.learning',
    '        self.history.append(row)\n        self.write_records(model)\n        self.learning', check_records_follow_the_network)
bug('the last row of the history is dropped', RUN, 'writer.writerows(self.history)', 'writer.writerows(self.history[:-1])',
    check_records_follow_the_network)
bug('the best file is that of the last epoch', RUN, 'if best_row(self.history) is self.history[-1] and self.is_scored:', 'if True:',
    check_the_best_file_is_that_of_the_best_epoch)
bug('the optimizer is not restored', RUN, "optimizer.load_state_dict(extra['state']['optimizer'])", "extra['state']['optimizer']",
    check_a_resumed_run_goes_on_bit_for_bit)
bug('the generators are not restored', RUN, "set_generator_states(model, extra['state']['generators'])", "extra['state']['generators']",
    check_a_resumed_run_goes_on_bit_for_bit)

bug('epochs count from 0', FIT, 'training.epoch(epoch))), len', 'training.epoch(epoch - 1))), len', check_epochs_count_from_one)
bug('signal handlers are not put back', FIT, '    finally:\n        set_handlers(before)', '    finally:\n        before',
    check_signals_are_given_back)
bug('the second signal asks again', FIT, '        set_handlers(before)\n        if first', '        if first', check_signals_are_given_back)
bug('signals are handled in any thread', FIT, 'if threading.current_thread() is not threading.main_thread():', 'if False:',
    check_signals_are_given_back)
bug('fit forgets the bound on the gradient', FIT, 'batches, schedule, max_norm)', 'batches, schedule)', check_fit_hands_on_norm_and_schedule)
bug('fit forgets the schedule', FIT, 'batches, schedule, max_norm)', 'batches, None, max_norm)', check_fit_hands_on_norm_and_schedule)
bug('the gradient is not clipped', STEP, 'clip_gradients(model.gradients(), max_norm)', 'model.gradients()',
    check_the_step_is_as_long_as_the_clipped_gradient)
bug('the gradient is clipped after the step', STEP, '        if max_norm is not None:\n            clip',
    '        optimizer.step(model.gradients())\n        if max_norm is not None:\n            clip', check_the_step_is_as_long_as_the_clipped_gradient)
bug('the schedule is a step late', STEP, 'schedule(optimizer.steps)', 'schedule(max(0, optimizer.steps - 1))',
    check_fit_hands_on_norm_and_schedule)
bug('the schedule is a step early', STEP, 'schedule(optimizer.steps)', 'schedule(optimizer.steps + 1)', check_fit_hands_on_norm_and_schedule)
bug('generators are not reset after a bad batch', STEP, '                    set_generator_states(model, before)\n', '',
    check_a_bad_batch_draws_nothing)

bug('the summary reports the best epoch', REPORT, 'summary([history[-1] for history in histories]',
    'summary([best_row(history) for history in histories]', check_summaries_are_of_the_last_epoch_and_of_all_folds)
bug('the summary reports the last epoch as that of the inner subjects', REPORT, 'rows = [best_row(history) for history in histories]',
    'rows = [history[-1] for history in histories]', check_summaries_are_of_the_last_epoch_and_of_all_folds)
bug('scores of some folds are averaged as if they were all', REPORT, 'if len(scores) == len(chosen):', 'if scores:',
    check_summaries_are_of_the_last_epoch_and_of_all_folds)
bug('only two folds are averaged', REPORT, "f'{numpy.mean(values):.4f}'", "f'{numpy.mean(values[:2]):.4f}'",
    check_summaries_are_of_the_last_epoch_and_of_all_folds)
bug('baselines are those of the first fold', REPORT, 'for scores in baselines])', 'for scores in baselines[:1]])',
    check_summaries_are_of_the_last_epoch_and_of_all_folds)
bug('the deviation is that of a sample', REPORT, 'numpy.std(values)', 'numpy.std(values, ddof=1)',
    check_summaries_are_of_the_last_epoch_and_of_all_folds)
bug('the first of equal epochs is best', REPORT, "-row[f'{part}_loss'], row['epoch']", "-row[f'{part}_loss'], -row['epoch']",
    check_the_best_epoch)
bug('the loss does not decide between equals', REPORT, "return dice, -row[f'{part}_loss'], row['epoch']", "return dice, row['epoch']",
    check_the_best_epoch)
bug('Dice decides where there is no foreground', REPORT, "if row.get(f'{part}_true_foreground_share') != 0 else 0", '', check_the_best_epoch)
bug('a fold is left out of the summary', KFOLD, 'read_fold(self.fold(number)) for number in complete)',
    'read_fold(self.fold(number)) for number in complete[:-1])', check_a_cross_validation_sums_up_all_its_folds)
bug('the drawn baselines are those of the first fold', KFOLD, 'for each in baselines]))', 'for each in baselines[:1]]))',
    check_a_cross_validation_sums_up_all_its_folds)
bug('a fold without summary counts', KFOLD, "'summary.txt' in names", 'names',
    check_a_cross_validation_sums_up_all_its_folds)
bug('other claims are not looked at', CLAIMS, 'if is_alive(self.folder / name,', 'if not is_alive(self.folder / name,', check_a_folder_of_another_machine_is_refused_until_that_is_silent)
bug('the dead keep their claims', CLAIMS, 'if now - beaten(file) > SILENCE or', 'if', check_a_folder_of_another_machine_is_refused_until_that_is_silent)
bug('who has lost leaves a claim', CLAIMS, '        except BaseException:\n            self.let_go()', '        except BaseException:\n            self.folder',
    check_a_folder_of_another_machine_is_refused_until_that_is_silent)
bug('memory is not looked at', OPTIONS, 'needed * processes.neighbours > there:', 'needed < 0:', check_too_much_memory_is_refused)


passed = set()                  # the checks that have passed on the code as it is


@pytest.mark.parametrize('name', [pytest.param(name, id=name.replace(' ', '_')) for name in BUGS])
def test_planted_bug_is_caught(name, tmp_path):
    file, text, becomes, check = BUGS[name]
    if check not in passed:
        (tmp_path / 'right').mkdir()
        check(tmp_path / 'right', main_job())
        passed.add(check)
    (tmp_path / 'wrong').mkdir()
    if file == TRAIN:
        context, job = contextlib.nullcontext(), main_job(changed(file, text, becomes))
    else:
        context, job = planted(file, text, becomes), main_job()
    with context, pytest.raises((AssertionError, pytest.fail.Exception)):
        check(tmp_path / 'wrong', job)


def test_a_bug_is_gone_when_it_has_been_caught():
    code = run_folder.write_config.__code__
    with planted(RUN, 'with atomic_write(path) as file', "with open(path, 'wb') as file"):
        assert run_folder.write_config.__code__ is not code
    assert run_folder.write_config.__code__ is code
