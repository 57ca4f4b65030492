import io

from helpers import train
from nervenet.study.report import progress, summaries


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
