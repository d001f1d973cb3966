"""What the kernels are built for. The build reads this file and hands its numbers to the C++ headers."""

# A power of two, the width of the table of binomial coefficients; released routers choose among up to 512.
MAX_EXPERTS = 1024
# Released routers choose up to 22.
MAX_TOP_K = 64
# The kernels hold a rank in one word of this width: 22 of 512 experts just fit.
MAX_RANK_BITS = 128
