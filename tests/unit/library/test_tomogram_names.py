"""What tomograms are called."""

from cryofleet.tomogram_names import file_stem, plain_names, unique_name


def test_the_stem_of_a_file_is_a_name_that_star_files_and_mrc_labels_can_hold() -> None:
    assert file_stem("file:///data/krios1/TS_01.mrc") == "TS_01"
    assert file_stem("s3://bucket/TS_01.rec.gz") == "TS_01"
    assert file_stem("rec_TS_01_10.00Apx.mrc") == "rec_TS_01_10.00Apx"
    assert file_stem('my "tomo" #1~2.ozx') == "my_tomo_1_2"
    assert file_stem("x" * 300 + ".mrc") == "x" * 40
    assert file_stem("é.mrc") == "_"
    assert file_stem(".mrc") == "tomogram"


def test_others_get_plain_names_where_they_stay_distinct() -> None:
    one, two, three = (unique_name(name, digest * 64) for name, digest in (("a", "1"), ("a", "2"), ("b", "1")))
    assert plain_names([one, three, one]) == {one: "a", three: "b"}
    assert plain_names([one, two, three]) == {one: one, two: two, three: "b"}
    assert plain_names(["a", one]) == {"a": "a", one: one}
    assert plain_names(["", "TS_01"]) == {"": "", "TS_01": "TS_01"}, "what was not ingested keeps its name"
