import pytest
import torch

from models.nano.generated_rows import generated_rows


def test_a_row_is_a_function_of_seed_and_id_alone() -> None:
    rows = generated_rows([7, 200_000, 0], 64, 5, 0.25)
    assert torch.equal(generated_rows([200_000], 64, 5, 0.25), rows[1:2])
    assert not torch.equal(generated_rows([200_000], 64, 6, 0.25), rows[1:2])
    assert generated_rows([], 64, 5, 0.25).shape == (0, 64)


def test_rows_stay_what_they_were_when_the_model_was_trained() -> None:
    """The bits are those of `printf "\\5\\0\\0\\0\\0\\0\\0\\0\\7\\0\\0\\0\\0\\0\\0\\0" | openssl shake256 -xoflen 2`."""
    signs = generated_rows([7], 16, 5, 1.0)[0].lt(0).int().tolist()
    assert int("".join(map(str, signs)), 2) == 0x98D7


def test_elements_are_the_scale_itself_and_rows_nearly_orthogonal() -> None:
    rows = generated_rows(range(500), 256, 1, 0.0625)
    assert rows.dtype == torch.bfloat16
    assert rows.abs().unique().tolist() == [0.0625]
    cosines = (rows.float() @ rows.float().T) / (256 * 0.0625**2)
    assert cosines.fill_diagonal_(0).abs().max() < 0.4


def test_a_scale_that_bfloat16_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.02 is not exact in bfloat16"):
        generated_rows([0], 32, 0, 0.02)
