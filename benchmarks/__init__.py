"""Benchmarks: ``python -m benchmarks``. What is timed is a registry, and what it is held against too.

__main__   the command line
cases      the registry of cases: shapes, geometry, dtype, peers
models     whole networks: ours, and transformers' Swin-T and ConvNeXt-T
peers/     one module a way to compute local attention, ours included; each gives a Subject to time
subject    what a Subject is
flops      useful arithmetic of a case, from the geometry tables
checks     a result is right before it is fast
ceilings   what the machine can do: matrix products, copies, fresh memory
sampling   interleaved samples of all subjects, round by round
memory     peak memory, in a child process
machine    processor, versions, commit
run        a run: every case, one JSON
summary    medians, spreads, shares and ratios out of a run's raw samples
report     the tables on the terminal
readme     the table in README.md
"""
