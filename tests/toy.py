"""A dual encoder and a loader small enough for tests that start, kill and compare whole training runs."""
import contextlib
import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Callback
from torch import nn

from medcl_study.core import content_hash, seed_everything
from medcl_study.embeddings import Embeddings
from medcl_study.losses.contrast import contrastive
from medcl_study.trainer import MicroBatches, TrainConfig, average_gradients, process_group, train


def pairs(n, seed=0):
    "Draw pairs of nine noisy patches and four words that tell the same hidden point."
    g = torch.Generator().manual_seed(seed)
    camera = torch.randn(9, 4, 8, generator=torch.Generator().manual_seed(99))
    z = torch.rand(n, 4, generator=g)
    images = torch.einsum('nz,pzf->npf', z - .5, camera) + .1 * torch.randn(n, 9, 8, generator=g)
    return {'images': images, 'tokens': (z * 16).long() + 16 * torch.arange(4)}


class Loader:
    "Batches of pairs in an order that depends on the epoch alone; rank r gets its rows of each global batch."
    def __init__(self, data, size, *, shuffle=False, rank=0, world=1):
        self.data, self.size, self.shuffle, self.at = data, size, shuffle, (0, 0)
        self.mine = slice(rank * size // world, (rank + 1) * size // world)

    def set_position(self, epoch, start_batch): self.at = epoch, start_batch
    def __len__(self): return len(self.data['images']) // self.size

    def __iter__(self):
        epoch, start = self.at
        n = len(self.data['images'])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)) if self.shuffle else torch.arange(n)
        for i in range(start, len(self)):
            rows = order[i * self.size:(i + 1) * self.size][self.mine]
            yield {k: v[rows] for k, v in self.data.items()}


def loaders(size=32, n=192, **kwargs):
    return DataLoaders(Loader(pairs(n), size, shuffle=True, **kwargs), Loader(pairs(64, seed=1), size, **kwargs))


class Encoder(nn.Module):
    "Two towers with dropout, random patch masks, norms and a learned temperature."
    def __init__(self, *, width=16, dropout=0.0, mask_ratio=0.0, norm=nn.LayerNorm, seed=0):
        seed_everything(seed)
        super().__init__()
        self.patch = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Dropout(dropout))
        self.place = nn.Parameter(.02 * torch.randn(9, width))
        self.image_norm, self.image_head = norm(width), nn.Linear(width, 16)
        self.words, self.text_head = nn.Embedding(64, width), nn.Linear(width, 16)
        self.log_scale = nn.Parameter(torch.tensor(1 / .07).log())
        self.mask_ratio = mask_ratio

    def forward(self, batch):
        patches = self.patch(batch['images']) * (1 + self.place)
        if self.training and self.mask_ratio:
            noise = torch.rand(patches.shape[:2], device=patches.device)
            kept = noise.argsort(1)[:, :max(1, int(9 * (1 - self.mask_ratio)))]
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
        unit = partial(nn.functional.normalize, dim=-1)
        image = self.image_head(self.image_norm(patches.mean(1)))
        text = self.text_head(self.words(batch['tokens']).mean(1))
        return Embeddings(image=unit(image.float()), text=unit(text.float()), scale=self.log_scale.exp())

    @torch.no_grad()
    def clamp_(self): self.log_scale.clamp_(0, math.log(100))


def gradients(model, forward, batch, reduce=None):
    "Return the gradient of each parameter by name after one backward pass."
    model.zero_grad()
    contrastive(forward(batch)).backward()
    if reduce: reduce(model)
    return {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}


def weights_hash(model): return content_hash(*(o.detach().cpu().numpy() for o in model.state_dict().values()))


CONFIG = TrainConfig(epochs=4, batch_size=32, lr=1e-2, log_every=2, save_every=2)


class Die(Callback):
    "Kill this very process with SIGKILL at a chosen place."
    order = 100
    def __init__(self, step, place): self.die_at, self.place = step, place
    def _die(self, place):
        if place == self.place and self.train_iter == self.die_at: os.kill(os.getpid(), signal.SIGKILL)

    def before_fit(self):
        if self.place != 'saving': return
        save = self.checkpoint._save
        def half_written():
            if self.train_iter == self.die_at:
                torch.save = lambda state, file: (Path(file).write_bytes(b'half'), os.kill(os.getpid(), signal.SIGKILL))
            save()
        self.checkpoint._save = half_written

    def after_backward(self): self._die('backward')
    def after_batch(self): self._die('batch' if self.training else 'validation')


def killed_run(folder, step=None, place=None):
    "Train in `folder`; with a place, die there. Runs in a process of its own."
    torch.set_num_threads(1)
    model = Encoder(dropout=.2, mask_ratio=.5)
    history = train(model, contrastive, loaders(), CONFIG, folder=folder, callbacks=[Die(step, place)] if place else [])
    (Path(folder)/'result.json').write_text(json.dumps({'hash': weights_hash(model), 'history': history}))


class StopAt(Callback):
    "Interrupt a run after a step."
    def __init__(self, step): self.stop_at = step
    def after_batch(self):
        if self.training and self.train_iter == self.stop_at: raise KeyboardInterrupt


def encoder_with_idle_parts(seed=0):
    "An encoder with one frozen layer and one layer that no pair passes through."
    model = Encoder(seed=seed)
    model.words.requires_grad_(False)
    model.idle = nn.Linear(3, 3)
    return model


def rows_in_half(rank, world):
    "Compute one step of every method on this rank's part of the batch; texts are cut to the part's own length."
    import rows
    data = {k: v.chunk(world)[rank] for k, v in rows.batch().items()}
    longest = int(data['token_mask'].sum(1).max())
    data |= {k: data[k][:, :longest] for k in ('tokens', 'token_mask', 'sentence_index')}
    return rows.of_all_rows(data, reduce=average_gradients)


def two_process_run(folder):
    "Run every check that needs two processes; started by torchrun, which `test_distributed.py` calls once."
    torch.set_num_threads(1)
    with process_group():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        data = pairs(32)
        half = {k: v.chunk(world)[rank] for k, v in data.items()}
        kwargs = dict(rank=rank, world=world)
        found = {}
        for name, parts in {'plain': 1, 'accumulated': 3}.items():
            model = encoder_with_idle_parts()
            found[name] = gradients(model, MicroBatches(model, parts), half, reduce=average_gradients)
        found['loss'] = contrastive(Encoder()(half)).detach()

        model = Encoder(seed=rank) # different weights on purpose: training must start from those of rank 0
        history = train(model, contrastive, loaders(**kwargs), CONFIG)
        found['trained'], found['history'] = model.state_dict(), history

        hashes = []
        for stop in (None, 5):
            where = Path(folder)/f'stopped-{stop}'
            if stop:
                with contextlib.suppress(KeyboardInterrupt):
                    train(Encoder(dropout=.2, mask_ratio=.5, seed=rank), contrastive, loaders(**kwargs), CONFIG,
                          folder=where, callbacks=[StopAt(stop)])
            model = Encoder(dropout=.2, mask_ratio=.5, seed=rank)
            train(model, contrastive, loaders(**kwargs), CONFIG, folder=where)
            hashes.append(weights_hash(model))
        found |= {'hashes': hashes, 'world': world, 'rows': rows_in_half(rank, world)}
        torch.save(found, Path(folder)/f'rank{rank}.pt')


if __name__ == '__main__': two_process_run(sys.argv[1])
