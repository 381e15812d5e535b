"""The rule by which a kernel's result is right."""

import torch


def assert_as_accurate(
    ours: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 2.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that ``ours`` is at most ``factor`` times as far from ``exact`` (fp64) as plain torch in the same dtype.

    Distances are largest absolute differences; one rounding of the largest exact value in ``ours``'s dtype is allowed
    on top, for cases where plain torch happens to hit the exact value; ``dtype`` names a coarser one that intermediate
    values had, where so few numbers are compared that chance decides.
    """
    assert ours.shape == plain.shape == exact.shape, (ours.shape, plain.shape, exact.shape)
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    assert torch.equal(ours.double().isfinite().cpu(), exact.isfinite().cpu())
    exact = exact.cpu()
    our_error = float((ours.detach().cpu().double() - exact).abs().max())
    plain_error = float((plain.detach().cpu().double() - exact).abs().max())
    rounding = torch.finfo(dtype or ours.dtype).eps * float(exact.abs().max())
    assert our_error <= factor * plain_error + rounding, f"error {our_error:.3g}, plain torch's {plain_error:.3g}"
