"""Several runs of one job that differ in what a study varies, as trials of Ray Tune."""
