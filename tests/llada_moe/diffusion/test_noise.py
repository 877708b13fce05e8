"""The forward process: pure, of the right frequency, and never silently another one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.diffusion.noise import ForwardProcess, ReplacementVocabulary, SampleCoordinates

PLAIN = ObjectiveConfig()


def process(seed=0, batch=8, split="train", **keys):
    return ForwardProcess(ObjectiveConfig(**keys), seed, batch, split)


def at(number=0, set=0, epoch=0, window=0):
    return SampleCoordinates(number, set, epoch, window)


def test_golden_draws():
    """These values must never change: a run that resumes under another numpy or version would see other masks."""
    noise = process(seed=1234, random_length_probability=0.5)
    one = noise.corrupt(at(7, set=2, epoch=3, window=49), 40)
    assert "".join(".#"[int(m)] for m in one.mask) == "...###...#.#..##.###.#.###.............."
    assert (one.ratio, one.length) == (0.4650996261327646, 27)
    assert [process(seed=s).mask_ratio(at(window=w)) for s, w in ((0, 0), (0, 1), (2**63, 5))] == [
        0.01253520753204523,
        0.3428406019575923,
        0.7959376960338892,
    ]
    strata = process(seed=9, batch=8, time_sampling="stratified")
    assert [strata._stratum(n) for n in range(16)] == [0, 3, 1, 2, 5, 7, 4, 6, 0, 5, 2, 6, 7, 3, 1, 4]


@given(st.integers(0, 2**64 - 1), st.integers(0, 50), st.integers(0, 50), st.integers(0, 10**9), st.integers(1, 200))
def test_pure_and_position_by_position(seed, set, epoch, window, length):
    """Position i takes draw i: a longer sequence begins with the same mask, and nothing else takes part."""
    where = at(3, set, epoch, window)
    noise = process(seed, random_length_probability=0.0)
    one, again = noise.corrupt(where, length), process(seed, random_length_probability=0.0).corrupt(where, length)
    longer = noise.corrupt(at(99, set, epoch, window), length + 13)
    assert (one.mask == again.mask).all() and one.ratio == again.ratio == longer.ratio
    assert (longer.mask[:length] == one.mask).all()


def test_every_coordinate_matters():
    length = 256
    variants = [(0, at()), (1, at()), (0, at(set=1)), (0, at(epoch=1)), (0, at(window=1))]
    masks = {process(seed, random_length_probability=0.0).corrupt(c, length).mask.tobytes() for seed, c in variants}
    validation = process(batch=1, split="validation", random_length_probability=0.0).corrupt(at(), length)
    assert len(masks | {validation.mask.tobytes()}) == 6


@given(st.integers(0, 500), st.integers(1, 7), st.sampled_from([(0.0, 1.0, 0.5), (0.3, 0.7, 0.01)]))
def test_both_of_a_pair_have_one_range_of_ratios_also_block_by_block(window, size, band):
    low, high, epsilon = band
    noise = process(complementary_masks=True, mask_ratio_min=low, mask_ratio_max=high, epsilon=epsilon)
    least = (1 - epsilon) * low + epsilon / 2
    pair = [SampleCoordinates(0, 0, 0, window, inverse) for inverse in (False, True)]
    assert all(least <= noise.corrupt(one, 20).ratio <= 1 - least for one in pair)
    one, other = (noise.corrupt(one, 20, np.arange(20) // size) for one in pair)
    assert ((one.mask ^ other.mask) == (np.arange(20) < one.length)).all()
    assert np.allclose(one.ratios + other.ratios, 1.0) and other.ratio == pytest.approx(other.ratios.mean())
    assert ((one.ratios >= least) & (one.ratios <= 1 - least)).all() and len(set(one.ratios)) == -(-20 // size)


def test_a_pair_masks_each_token_once_within_the_band():
    keys = {"complementary_masks": True, "mask_ratio_min": 0.3, "mask_ratio_max": 0.7, "epsilon": 0.0}
    noise = process(batch=8, time_sampling="stratified", random_length_probability=0.5, **keys)
    strata = set()
    for number in range(4):  # a global batch of eight samples has four pairs
        one = noise.corrupt(SampleCoordinates(number, 0, 0, number), 64)
        other = noise.corrupt(SampleCoordinates(number, 0, 0, number, inverse=True), 64)
        assert one.length == other.length and one.ratio + other.ratio == pytest.approx(1.0)
        assert ((one.mask ^ other.mask) == (np.arange(64) < one.length)).all()
        assert 0.3 <= one.ratio <= 0.7 and 0.3 <= other.ratio <= 0.7
        strata.add(int((one.ratio - 0.3) / 0.1))
    assert strata == {0, 1, 2, 3}


def test_mask_frequency_is_the_ratio():
    """Over 400 sequences of 500 tokens, within 4 standard deviations; neighbours are not correlated."""
    noise = process(random_length_probability=0.0)
    draws = [noise.corrupt(at(window=w), 500) for w in range(400)]
    p = np.array([d.ratio for d in draws])
    masks = np.stack([d.mask for d in draws])
    assert abs(masks.sum() - 500 * p.sum()) < 4 * np.sqrt(500 * (p * (1 - p)).sum())
    rest = masks - p[:, None]
    pairs = (rest[:, 1:] * rest[:, :-1]).sum() / (499 * ((p * (1 - p)) ** 2).sum()) ** 0.5
    assert abs(pairs) < 4


def test_times_are_uniform():
    t = np.sort([process().mask_ratio(at(window=w)) for w in range(2000)])
    distance = np.abs(t - (np.arange(2000) + 0.5) / 2000).max()
    assert distance < 1.95 / np.sqrt(2000)  # Kolmogorov-Smirnov, 0.1 %


def test_expected_weight_of_every_token_is_one():
    """E[sum of 1/p over masked] = number of tokens, over masks and times."""
    noise = process(random_length_probability=0.0, mask_ratio_min=0.05)
    totals = np.array([(d := noise.corrupt(at(window=w), 200)).mask.sum() / d.ratio for w in range(3000)])
    assert abs(totals.mean() - 200) < 4 * totals.std() / np.sqrt(3000)


@given(st.integers(1, 97), st.integers(0, 30), st.integers(0, 2**32))
def test_stratified_covers_each_stratum_once_per_batch(batch, step, seed):
    noise = process(seed, batch, time_sampling="stratified", epsilon=0.0)
    t = [noise.mask_ratio(at(step * batch + i, window=i)) for i in range(batch)]
    assert sorted(int(x * batch + 1e-9) for x in t) == list(range(batch))


@given(st.floats(0, 0.9), st.floats(0.01, 0.1), st.integers(0, 1000))
def test_band(low, width, window):
    noise = process(mask_ratio_min=low, mask_ratio_max=low + width, epsilon=1e-3)
    t = (noise.mask_ratio(at(window=window)) - 1e-3) / (1 - 1e-3)
    assert low - 1e-12 <= t < low + width + 1e-12


def test_random_length_rule():
    always, never = process(random_length_probability=1.0), process(random_length_probability=0.0)
    cut = [always.corrupt(at(window=w), 10) for w in range(3000)]
    lengths = np.bincount([c.length for c in cut], minlength=11)
    assert lengths[0] == 0 and ((lengths[1:] - 300) ** 2 / 300).sum() < 27.9  # chi-square, 9 degrees, 0.1 %
    for w, c in enumerate(cut[:200]):
        whole = never.corrupt(at(window=w), 10)
        assert whole.length == 10 and not c.mask[c.length :].any()
        assert (c.mask[: c.length] == whole.mask[: c.length]).all()
    some = [process().corrupt(at(window=w), 4096).length < 4096 for w in range(3000)]
    assert abs(sum(some) - 30) < 4 * np.sqrt(30)


def test_golden_replacements():
    """As the masks: these draws must never change."""
    one = process(seed=1234, replace_ratio=0.4).corrupt(at(7, set=2, epoch=3, window=49), 40)
    assert "".join(".#"[int(r)] for r in one.replacement.replaced) == "##......#.......#.........#....#........"
    assert one.replacement.choice[:2].tolist() == [0.9989475280253686, 0.7482920052621497]


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 200), st.floats(0.01, 0.99))
def test_replacing_leaves_the_masks_alone(seed, window, length, ratio):
    with_, without = process(seed, replace_ratio=ratio), process(seed)
    one, other = with_.corrupt(at(window=window), length), without.corrupt(at(5, window=window), length)
    assert (one.mask == other.mask).all() and (one.ratio, one.length) == (other.ratio, other.length)
    assert other.replacement is None
    assert not (one.replacement.replaced & one.mask).any() and not one.replacement.replaced[one.length :].any()


def test_replacements_are_pure_position_by_position_and_differ_by_every_coordinate():
    variants = [(0, at()), (1, at()), (0, at(set=1)), (0, at(epoch=1)), (0, at(window=1))]
    seen = set()
    for seed, where in variants:
        noise = process(seed, random_length_probability=0.0, replace_ratio=0.3)
        one, longer = noise.corrupt(where, 100).replacement, noise.corrupt(where, 150).replacement
        assert (longer.replaced[:100] == one.replaced).all() and (longer.choice[:100] == one.choice).all()
        seen |= {one.replaced.tobytes(), one.choice.tobytes()}
    assert len(seen) == 2 * len(variants)


def test_replaced_share_of_the_unmasked_tokens():
    noise = process(random_length_probability=0.0, replace_ratio=0.15)
    draws = [noise.corrupt(at(window=w), 500) for w in range(200)]
    shown = sum(int((~d.mask).sum()) for d in draws)
    replaced = sum(int(d.replacement.replaced.sum()) for d in draws)
    assert abs(replaced - 0.15 * shown) < 4 * np.sqrt(0.15 * 0.85 * shown)
    assert process(split="validation", replace_ratio=0.15).corrupt(at(), 50).replacement is None


@given(st.integers(2, 30), st.sets(st.integers(0, 40)), st.floats(0, 1, exclude_max=True), st.data())
def test_another_word(size, special, choice, data):
    words = [i for i in range(size) if i not in special]
    if len(words) < 2:
        with pytest.raises(ValueError, match="no two ids that are text"):
            ReplacementVocabulary(size, special)
        return
    token = data.draw(st.integers(0, size + 5))
    (other,) = ReplacementVocabulary(size, special).other(np.array([token]), np.array([choice]))
    assert other in words and other != token


def test_all_other_words_are_equally_likely():
    words, choice = ReplacementVocabulary(10, {2, 3, 30}), (np.arange(8400) + 0.5) / 8400
    for token in (0, 4, 9, 3):
        found = np.bincount(words.other(np.full(8400, token), choice), minlength=10)
        others = [i for i in range(10) if i not in (2, 3, token)]
        assert (found[others] == 8400 // len(others)).all() and found.sum() == 8400


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(seed):
    assert 0 < process(seed).mask_ratio(at()) <= 1
