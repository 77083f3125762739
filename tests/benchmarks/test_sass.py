"""Loops of machine code, from a text written by hand."""

from __future__ import annotations

from benchmarks import sass

TEXT = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
        /*0060*/                   NOP;
"""


def test_a_loop_is_what_lies_between_a_label_and_a_branch_back():
    assert sass.parse_sass(TEXT) == (7, ((3, 1),))
