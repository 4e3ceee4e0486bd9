"""Sweeps: a YAML file of flags, variants, axes, seeds and tuning trials becomes a frozen plan of runs.

A run folder is the only state of a run. The local queue and SLURM job arrays are two ways to run the same plan.
"""
