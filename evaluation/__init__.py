"""Evaluation of HEAR modules as in the papers. The commands are `__main__` here and in `open_tasks`; their parts:

    run, kit, environment   hear-eval-kit on a directory of HEAR tasks, seed by seed, in an environment of its own
    probe                   a quick comparison of weights on validation clips, without heareval
    baselines, functionals  HEAR modules to compare with; `functionals` needs openSMILE, which is for research only
    aggregate               means, intervals, the papers' score s(m); published.csv has the papers' rows
    report*                 a page, tables and CSV files of results
    open_tasks/             small HEAR tasks from freely licensed recordings; tasks/ has their lists

Nothing else in `training` needs any of it.
"""
