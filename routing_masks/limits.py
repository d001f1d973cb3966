"""What the kernels are built for. The build reads this file and hands both numbers to the C++ headers."""

# A power of two, the width of the table of binomial coefficients; released routers choose among up to 512.
MAX_EXPERTS = 1024
# Released routers choose up to 22.
MAX_TOP_K = 64
