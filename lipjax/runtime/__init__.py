"""The machine below: several hosts (`hosts`), and what makes CPUs quick (`cpu`)."""
