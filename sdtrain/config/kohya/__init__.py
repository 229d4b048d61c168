"""The options of sd-scripts and kohya_ss: what each of them is here, and whole configs turned into ours."""
