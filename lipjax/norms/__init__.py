"""Norms of masked linear maps, ``||D_out W D_in||_2``: estimates, and upper bounds.

| module | what it gives |
|---|---|
| `power` | power iteration: an estimate from below, differentiable |
| `lanczos` | an estimate from below, closer at the same cost: a scale for a bound |
| `chebyshev` | an upper bound that fails with a chosen probability |
| `closed` | Schur's test, the Frobenius norm |
| `gram` | the explicit masked Gram matrix |
| `banded` | block Cholesky along the image, for masked convolutions |
| `fourier` | the symbols of a convolution, unmasked |
| `best` | chooses among the last four by a budget: the norm of tier "deterministic" |

Estimates and bounds are different functions with different names: no flag turns one into the other.
All work on one example and go through `jit` and `vmap`. Where one example fills the device, `vmap`
takes one after the other (as `jax.lax.map` does), so that memory is that of one example and no
example waits for another's attempts.

**Guarantee of the deterministic bounds.** The value returned is at least the exact norm of the
matrix with the given float64 entries, whatever the guess of the norm, the masks and the entries;
where the arithmetic breaks down (NaN, overflow) it is infinity. Exactly 0 is returned where a mask
keeps nothing, and only there.

Assumed: IEEE float64 with unit roundoff u = 2^-53 (underflow may flush to zero), and products of
matrices and convolutions that are inner products, summed in any order, with or without fused
multiply-adds (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed. 2002, section 3.1):
n terms err by at most ``gamma(n) sum |a_i b_i|``. No Strassen, Winograd or Fourier products.
*Nothing* is assumed of Cholesky factorisations and triangular solves: their results are multiplied
out and what is left over is added to the bound.
"""
