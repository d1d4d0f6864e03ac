"""What depends on the machine: jobs of several processes (`hosts`), fast CPU programs (`cpu`),
compiled programs on disk (`kept`)."""
