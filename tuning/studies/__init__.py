"""Ready studies: a function here is a study, ``sce_temperature`` is ``sce-temperature``. See raycon/tuning/study.py."""
