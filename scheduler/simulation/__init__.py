"""The production core on a virtual clock: simulated groups, seeded workloads, other policies to compare with."""
