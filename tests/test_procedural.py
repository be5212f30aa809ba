"Procedural pictures: every family does what its formula says, and the same request draws the same pictures."
import subprocess
import sys

import numpy as np
import pytest

from medcl_study.core import content_hash
from medcl_study.data.procedural import (FACTORS, FAMILIES, IFS, SYSTEMS, _cell_field, _count, _edge, _orbit, _ramp, classes_of,
                                         procedural_pictures, spectral_noise, waves)


def chaos_game(maps, rng, points):
    "The textbook loop: one point, one random map per step, the first twenty forgotten."
    x, out = np.zeros(2), []
    for step in range(points + 20):
        m = maps[rng.integers(4)]
        x = np.array([m[i, 0]*x[0] + m[i, 1]*x[1] + m[i, 2] for i in range(2)])
        if step >= 20: out.append(x)
    return np.stack(out, 1)


@pytest.mark.parametrize('system', [0, 7, 21])
def test_addresses_draw_the_attractor_of_the_chaos_game(system):
    "All addresses at once and one wandering point have the same density."
    rng = np.random.default_rng(system)
    slow, fast = chaos_game(IFS[system].astype(float), rng, 20000), _orbit(IFS[system][None], rng, 7)[0]
    centre, size = slow.mean(1, keepdims=True), 2.5*slow.std(1).max()
    slow, fast = (_count(*((o - centre)/size)[:, None], 12)[0] for o in (slow, fast))
    assert np.corrcoef(slow.ravel(), fast.ravel())[0, 1] > .97


def test_systems_are_contractions_and_the_same_everywhere():
    assert IFS.shape == (SYSTEMS, 4, 2, 3) and np.linalg.svd(IFS[..., :2], compute_uv=False).max() < .98
    spread = (np.linalg.svd(IFS[..., :2].astype(float), compute_uv=False) @ [1, 2]).sum(1)
    assert (spread > 4.5 - 1e-4).all() and (spread < 5 + 1e-4).all()
    other = subprocess.run([sys.executable, '-c', 'from medcl_study.core import content_hash; import medcl_study.data.procedural as p, sys;'
                            'assert "torch" not in sys.modules; print(content_hash(p.IFS), content_hash(p.procedural_pictures(3).images))'],
                           capture_output=True, text=True, check=True).stdout.split()
    assert other == [content_hash(IFS), content_hash(procedural_pictures(3).images)]


@pytest.mark.parametrize('slope', [.6, 1.1, 1.7, 2.4])
def test_spectrum_has_the_slope_it_was_asked_for(slope):
    field = spectral_noise(np.random.default_rng(0), 64, np.full(128, slope))
    assert np.allclose(field.mean((1, 2)), 0, atol=1e-4) and np.allclose(field.std((1, 2)), 1, atol=1e-4)
    amplitude = np.sqrt((np.abs(np.fft.fft2(field))**2/field.shape[0]).sum(0))
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    keep = (f > 0) & (f < .45)
    assert abs(np.polyfit(np.log(f[keep]), np.log(amplitude[keep]), 1)[0] + slope) < .05


def test_stretched_spectrum_points_where_it_should():
    "Stretched at angle a, energy lies along a: rows vary most at 0, columns at 90 degrees."
    make = lambda angle: spectral_noise(np.random.default_rng(0), 64, np.full(32, 1.5), angle=np.full(32, angle), stretch=np.full(32, 5.))
    across = lambda field: np.abs(np.diff(field, axis=2)).mean()/np.abs(np.diff(field, axis=1)).mean()
    assert across(make(0.)) > 1.5 and across(make(np.pi/2)) < 1/1.5


def test_sine_gratings_have_their_frequency_and_direction():
    "The strongest coefficient of a sine grating lies at the drawn frequency class and within the drawn direction's jitter."
    fields, levels = waves(200, 64, np.random.default_rng(0))
    cycles = np.array([1.25, 2.5, 4.5, 7.5])
    for field, kind, scale, direction in zip(fields, levels['kind'], levels['scale'], levels['orientation']):
        if kind or scale < 2: continue
        power = np.abs(np.fft.fft2(field - field.mean()))**2
        fy, fx = np.unravel_index(power.argmax(), power.shape)
        fy, fx = (o - 64 if o > 32 else o for o in (fy, fx))
        assert abs(np.hypot(fy, fx)/cycles[scale] - 1) < .3
        turn = (np.arctan2(fy, fx) - direction*np.pi/4 + np.pi/2) % np.pi - np.pi/2
        assert abs(turn) < .45


def test_cells_against_a_loop():
    "Nearest and second nearest centre, pixel by pixel."
    rng = np.random.default_rng(0)
    centres, grey = rng.random((6, 2)), rng.random(6)
    squared = np.array([[[(y - cy)**2 + (x - cx)**2 for x in np.linspace(0, 1, 5)] for y in np.linspace(0, 1, 5)] for cy, cx in centres])
    for i in range(5):
        for j in range(5):
            order = sorted((squared[k, i, j], k) for k in range(6))
            assert _cell_field(2, squared, grey)[i, j] == grey[order[0][1]]
            assert np.isclose(_cell_field(0, squared, grey)[i, j], np.sqrt(order[0][0]*6)/1.3)
            wall = (np.sqrt(order[1][0]) - np.sqrt(order[0][0]))*np.sqrt(6)/.9
            assert np.isclose(_cell_field(1, squared, grey)[i, j], wall, atol=1e-6)


def test_outlines():
    "A disc is round; a square's corners lie √2 times as far as its sides; a flower has its six petals."
    angle = np.linspace(-np.pi, np.pi, 721)[None, None]
    outline = lambda kind: _edge(angle.copy(), np.array([kind]))[0, 0]
    assert np.allclose(outline(0), 1)
    assert np.isclose(outline(3).max()/outline(3).min(), np.sqrt(2), atol=1e-3)
    flower = outline(5)[:-1]
    assert ((flower > np.roll(flower, 1)) & (flower > np.roll(flower, -1))).sum() == 6


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('size', [32, 64, 112])
def test_every_family_at_every_size(family, size):
    pictures = procedural_pictures(8, size=size, families=(family,), channels=3, seed=size)
    assert pictures.images.shape == (8, size, size, 3) and pictures.images.dtype == np.uint8
    assert (pictures.images.std((1, 2)) > 2).any(1).mean() >= .75, 'most pictures show something'
    assert {classes_of('family')[i][0] for i in pictures.classes['family'][:, 0]} == {family}
    for factor in FACTORS[1:]:
        found = pictures.classes[factor]
        assert all(classes_of(factor)[i][0] == family for i in found[found >= 0])
        if factor not in FAMILIES[family][1]: assert (found == -1).all()


def test_pictures_are_a_function_of_the_request():
    one, two = procedural_pictures(70, seed=3), procedural_pictures(33, seed=3)
    assert (one.images[:33] == two.images).all() and (one.cover[:33] == two.cover).all()
    assert all((one.classes[k][:33] == two.classes[k]).all() for k in FACTORS)
    assert (procedural_pictures(33, seed=4).images != two.images).any((1, 2, 3)).all()


def test_scenes():
    "The share of scenes is the one asked for; a second layer shows exactly where the first does not."
    for share in (0, .5, 1):
        pictures = procedural_pictures(320, size=16, scenes=share)
        assert abs((~pictures.plain()).mean() - share) < .08
        assert pictures.cover[pictures.plain()].all()
        assert ((pictures.classes['family'] >= 0).sum(1) == 2 - pictures.plain()).all()
    assert .3 < pictures.cover.mean() < .7


def test_ramps():
    "Grey ramps are monotone and span at least 0.2; colour ramps are tinted."
    grey = _ramp(500, 1, np.random.default_rng(0))
    assert grey.shape == (500, 3, 1) and grey.min() >= 0 and grey.max() <= 1
    steps = np.diff(grey[..., 0], axis=1)
    assert ((steps >= 0).all(1) | (steps <= 0).all(1)).all() and np.abs(grey[:, 2] - grey[:, 0]).min() > .19
    assert _ramp(500, 3, np.random.default_rng(0)).std(2).mean() > .08


@pytest.mark.parametrize('request_, message', [
    (dict(families=('clouds',)), 'unknown families'), (dict(channels=4), 'channels must be 1'), (dict(size=8), 'size must be at least 16')])
def test_refusals(request_, message):
    with pytest.raises(ValueError, match=message): procedural_pictures(2, **request_)
    with pytest.raises(ValueError, match='n must be at least 1'): procedural_pictures(0)
