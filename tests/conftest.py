"""What several test modules need: one thread, and two processes of one group."""
import pytest
import torch
from torch.multiprocessing import start_processes


@pytest.fixture(scope='module')
def one_thread():
    "Compute in one thread: tiny matrices are several times faster, and sums come in one order."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _a_rank(rank, folder, work):
    "Join the group, and leave what `work(rank)` returns in a file."
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.save(work(rank), folder/f'{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(one_thread, tmp_path_factory):
    "Call `work(rank)` in two processes of one group, forked so that nothing is imported again; returns both results."
    def call(work):
        folder = tmp_path_factory.mktemp('ranks')
        start_processes(_a_rank, (folder, work), nprocs=2, start_method='fork')
        return [torch.load(folder/f'{r}.pt', weights_only=True) for r in range(2)]
    return call
