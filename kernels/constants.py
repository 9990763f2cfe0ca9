"""Numbers on which the kernels and the host that allocates for them must agree. Python ints: the host does not import Triton."""

STATE = 4  # scalars at the head of `saved` (rowwise.py)
PARTIALS_BLOCK = 1024  # partial sums, or row losses, that a program reads at a time (reduction.py)
MAX_UNGROUPED = 4096  # programs that draw tickets from one counter
N_GROUPS = 64  # of more programs, each with a counter of its own; a power of two
MEETING_BITS = 10  # of the number of programs that wait for each other until they have summed a mean's weights (denominator.py)
DIGIT_BITS = 8  # of a key, which the selection finds at a time
N_SELECTION = 4  # integers that the launches of a selection hand on (selection.py)
N_SELECTED_SUMS = 3
HISTOGRAM = 512  # place among the counters of the digits' counts
N_COUNTERS = 1024  # more than 1 + N_GROUPS, than 1 + the rows that a forward cuts, and than HISTOGRAM + 2**DIGIT_BITS
MAX_ROWS = 2**31 // 6  # of a row up to 6 numbers are kept, each n_rows behind the one before: int32, as the rows themselves
N_TALLY = 3  # integers that keep a Tally
N_STATISTICS = 5  # of a slice (slices.py)
FRACTION_BITS = 32  # a fraction of the rows counts in units of 2**-FRACTION_BITS, so that all agree on k to the last row
