import io

from helpers import train
from nervenet.images.samples import Sample
from nervenet.study.report import best_row, progress, summaries, without_foreground


def test_summary_has_the_reference_form(loaders, tmp_path):
    _, run, rows = train(loaders, tmp_path / 'run', epochs=1)
    scores = {'dice_pooled': 0.4, 'dice_per_image': 0.5, 'iou_pooled': 0.3, 'accuracy': 0.9}
    text = run.summarize({'empty mask': scores})
    assert (run.path / 'summary.txt').read_text() == text
    for line in (f'accuracies: [{rows[0]["validation_accuracy"]:.4f}]', f'losses: [{rows[0]["validation_loss"]:.4f}]',
                 f'dicecoefs: [{rows[0]["validation_soft_dice_pooled"]:.4f}]', 'empty mask: hard dice 0.4000, per'):
        assert line in text
    assert 'average' not in text and '±' not in text                         # of one run
    other = rows[0] | {'validation_accuracy': rows[0]['validation_accuracy'] - 0.2}
    text = summaries([[rows[0]], [other]], [{'empty mask': scores}] * 2, [{}] * 2)
    assert f'average accuracies: {rows[0]["validation_accuracy"] - 0.1:.4f} ± 0.1000' in text
    assert 'empty mask: hard dice 0.4000 ± 0.0000' in text
    assert text.count('mean ± population standard deviation of the folds') == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_passes_everything_through_with_a_bar_on_a_terminal_and_plain_lines_elsewhere():
    terminal, file, quick = Terminal(), io.StringIO(), io.StringIO()
    for stream, seconds in (terminal, 30), (file, 0), (quick, 30):
        assert list(progress(range(5), 5, 'epoch 1/2', stream, seconds)) == list(range(5))
    assert '\repoch 1/2 [' in terminal.getvalue() and 'left' in terminal.getvalue() and terminal.getvalue().endswith('\r\x1b[K')
    assert file.getvalue().splitlines()[2].startswith('epoch 1/2  3/5') and '\r' not in file.getvalue()
    assert quick.getvalue() == ''


def row(epoch, dice, loss, share=0.1, part='validation'):
    return {'epoch': epoch, f'{part}_dice_pooled': dice, f'{part}_loss': loss, f'{part}_true_foreground_share': share}


def test_the_best_epoch_has_the_highest_dice_then_the_lowest_loss_then_comes_last():
    def best(*rows):
        return best_row(list(rows))['epoch']

    assert best(row(1, 0.2, 5), row(2, 0.3, 9), row(3, 0.1, 1)) == 2
    assert best(row(1, 0.0, 0.7), row(2, 0.0, 0.5), row(3, 0.0, 0.6)) == 2
    assert best(row(1, 0.2, 0.5), row(2, 0.2, 0.5), row(3, 0.1, 0.1)) == 2
    inner = [row(1, 0.9, 1) | row(1, 0.1, 1, part='inner'), row(2, 0.1, 1) | row(2, 0.2, 1, part='inner')]
    assert best(*inner) == 2


def test_without_foreground_the_loss_alone_says_which_epoch_is_best():
    """There, an epoch that predicts nothing at all has Dice 1, and every other one 0."""
    assert best_row([row(1, 1.0, 0.9, share=0), row(2, 0.0, 0.2, share=0), row(3, 0.0, 0.4, share=0)])['epoch'] == 2


def test_the_warning_about_a_part_without_foreground_names_whom_it_holds():
    samples = [Sample(f'{subject}_{image}', str(subject), None, None) for subject in (10, 2) for image in (1, 2)]
    text = without_foreground('validation', samples)
    assert text.startswith('WARNING: none of the 4 validation masks holds any foreground (subjects 2, 10)') and '\n' not in text
    assert 'larger --validation-share' in text and 'larger --inner-share' in without_foreground('inner', samples)
    many = without_foreground('inner', [Sample(str(n), str(n), None, None) for n in range(9)])
    assert '(subjects 0, 1, 2, 3, 4, … 4 more)' in many
