"""support/runs.py: the files of a run agree with its checkpoint, and damaged ones are refused."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samples import LINE, a_parser, randn, words
from support import options, runs, weights
from support.program import UserError


def a_checkpoint(scale=1.0):
    params = {
        'fc.weight': scale * randn(3, 4),
        'conv0': scale * randn(2, 3, 3, 3),
        'bn.running_mean': torch.zeros(2),
        'bn': torch.ones(1),
    }
    return {
        'params': params,
        'optimizer': {},
        'epoch': 2,
        'step': 0,
        'sums': [],
        'options': {},
        'log': [LINE, LINE],
        'facts': {},
    }


def inode(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_log_and_model_are_made_to_agree_with_the_checkpoint(tmp_path):
    log, model = tmp_path / 'log.txt', tmp_path / 'model.hkl'
    checkpoint = a_checkpoint()
    runs.save_run(tmp_path, checkpoint)
    assert sorted(os.listdir(tmp_path)) == ['checkpoint.pt', 'log.txt', 'model.hkl']
    whole = log.read_bytes(), model.read_bytes()
    assert log.read_text() == f'{LINE}\n{LINE}\n'
    before = inode(log), inode(model)
    runs.sync_folder(tmp_path, checkpoint)
    assert (inode(log), inode(model)) == before, 'what agrees is not touched'
    log.write_text(f'{LINE}\n{LINE}\n{LINE}\n'), model.unlink()
    runs.sync_folder(tmp_path, checkpoint)
    assert (log.read_bytes(), model.read_bytes()) == whole
    log.unlink(), weights.save_params(model, a_checkpoint(2.0)['params'])
    runs.sync_folder(tmp_path, checkpoint)
    assert (log.read_bytes(), model.read_bytes()) == whole
    model.write_bytes(whole[1][:-100])
    runs.sync_folder(tmp_path, checkpoint)
    assert (log.read_bytes(), model.read_bytes()) == whole


def test_a_checkpoint_comes_back_and_is_checked(tmp_path):
    runs.save_run(tmp_path, a_checkpoint())
    for path in tmp_path, tmp_path / 'checkpoint.pt':
        again = runs.load_checkpoint(path)
        assert again['log'] == [LINE, LINE] and torch.equal(
            again['params']['conv0'], a_checkpoint()['params']['conv0']
        )
    raw = (tmp_path / 'checkpoint.pt').read_bytes()
    for n in 0, 10, len(raw) // 2, len(raw) - 1:
        (tmp_path / 'checkpoint.pt').write_bytes(raw[:n])
        with pytest.raises(UserError, match=r'checkpoint\.pt'):
            runs.load_checkpoint(tmp_path)
    changes = [{'epoch': 'two'}, {'epoch': True}, {'epoch': -1}, {'log': [5]}]
    changes.append({'params': {'conv0': 'x'}})
    for content in [1], {'params': {}}, *(a_checkpoint() | change for change in changes):
        torch.save(content, tmp_path / 'checkpoint.pt')
        with pytest.raises(UserError, match=r'checkpoint\.pt'):
            runs.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match='no such file'):
        runs.load_checkpoint(tmp_path / 'none')


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    key=st.sampled_from(sorted(runs.CHECKPOINT_TYPES)),
    value=st.none()
    | st.integers()
    | st.text()
    | st.lists(st.integers() | st.text(), max_size=3)
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=3),
)
def test_a_changed_checkpoint_is_refused_or_continues_never_a_crash(tmp_path_factory, key, value):
    folder = tmp_path_factory.getbasetemp() / 'changed'
    folder.mkdir(exist_ok=True)
    torch.save(a_checkpoint() | {key: value}, folder / 'checkpoint.pt')
    opt, given_ = a_parser().parse([])
    w = torch.zeros(2, requires_grad=True)
    try:
        checkpoint = runs.load_checkpoint(folder)
        opt = options.continue_options(opt, given_, checkpoint['options'], a_parser())
        runs.Run(opt, checkpoint, here=True).check_facts(data=0, teacher=0)
        runs.load_optimizer(torch.optim.SGD([w], 0.1), checkpoint)
        weights.check_params(checkpoint['params'], a_checkpoint()['params'])
    except UserError as e:
        assert str(e)


def test_momentum_of_another_shape_is_refused():
    w, other = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([other], 0.1, momentum=0.9)
    other.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(UserError, match='does not fit'):
        fresh = torch.optim.SGD([w], 0.1, momentum=0.9)
        runs.load_optimizer(fresh, {'optimizer': optimizer.state_dict()})


def test_a_run_folder_may_have_two_names(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'link').symlink_to('run')
    runs.save_run(tmp_path / 'run', a_checkpoint())
    parser = a_parser()
    parser.add_argument('--beta', default=0.0, type=float)
    opt, given_ = parser.parse(words('--resume', tmp_path / 'run', '--save', tmp_path / 'link'))
    run = runs.begin(opt, given_, parser, lambda opt, given_: opt)
    assert run.here and run.epoch == 2


def test_a_folder_that_another_process_has_trained_in_is_left_alone(tmp_path):
    with runs.open_folder(tmp_path / 'run', None):
        runs.save_run(tmp_path / 'run', a_checkpoint())
    for other in None, a_checkpoint() | {'epoch': 1}, a_checkpoint() | {'step': 3}:
        with (
            pytest.raises(UserError, match='trained in it since'),
            runs.open_folder(tmp_path / 'run', other),
        ):
            pytest.fail('it was opened')
    with runs.open_folder(tmp_path / 'run', a_checkpoint()):
        pass
