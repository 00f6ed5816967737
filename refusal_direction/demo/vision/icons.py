"""The objects in the demo's images, as lists of simple shapes. Data only: `draw.py` renders them.

A shape is `ROLE FORM NUMBERS`; shapes are separated by `|`, and later ones cover earlier ones. Coordinates run from 0 to
100, with y pointing down. A role is a colour that is chosen anew for each image: A the first, B the second, D a dark one,
W a light one. Forms: `poly x,y ...`; `oval x,y rx,ry` (centre and radii); `ring x,y rx,ry` (outline of an oval);
`line x,y ...`. Dangerous and harmless objects use the same forms and colours: only the object tells them apart.
"""

from __future__ import annotations

__all__ = ["DANGEROUS", "HARMLESS", "OBJECTS"]

DANGEROUS: dict[str, str] = {
    "knife": "A poly 4,52 22,40 62,36 62,58 20,60 | B poly 62,38 96,38 96,56 62,56",
    "sword": "A poly 50,2 56,10 56,66 44,66 44,10 | B poly 26,64 74,64 74,73 26,73 | B poly 46,73 54,73 54,96 46,96",
    "axe": "B poly 42,8 51,8 51,96 42,96 | A poly 51,14 82,6 92,28 82,50 51,38",
    "gun": "A poly 8,26 92,26 92,44 46,44 40,84 18,84 26,44 8,44 | D line 46,44 50,60 64,58 66,44",
    "rifle": "A poly 2,44 98,44 98,51 2,51 | B poly 2,42 34,42 34,53 4,68 | B poly 52,51 64,51 60,76 48,74 | D line 40,37 62,37",
    "bomb": "A oval 44,62 32,32 | B poly 56,24 74,34 66,46 50,36 | D line 66,28 76,14 92,20 | W oval 92,20 6,6",
    "grenade": "A oval 48,62 25,31 | B poly 38,20 58,20 58,34 38,34 | D line 56,22 80,32 78,62 | D ring 26,24 10,10",
    "dynamite": "A poly 16,32 36,32 36,94 16,94 | A poly 40,32 60,32 60,94 40,94 | A poly 64,32 84,32 84,94 64,94"
    " | D line 14,62 86,62 | D line 50,32 54,14 70,8",
    "missile": "A poly 50,2 62,22 62,80 38,80 38,22 | B poly 38,58 18,90 38,82 | B poly 62,58 82,90 62,82 | W oval 50,36 6,6",
    "mine": "D line 50,4 50,96 | D line 4,50 96,50 | D line 18,18 82,82 | D line 82,18 18,82 | A oval 50,50 28,28 | W oval 50,50 8,8",
    "crossbow": "B poly 45,14 55,14 55,96 45,96 | A line 6,48 24,24 50,16 76,24 94,48 | D line 6,48 50,64 94,48",
    "spear": "B line 50,98 50,34 | A poly 50,2 66,32 50,42 34,32",
    "mace": "B line 50,98 50,46 | D line 50,2 50,56 | D line 22,29 78,29 | D line 30,9 70,49 | D line 70,9 30,49 | A oval 50,29 19,19",
    "poison": "B poly 42,4 58,4 58,28 42,28 | A poly 42,26 58,26 78,52 78,96 22,96 22,52 | W oval 50,66 15,14"
    " | D oval 44,65 4,5 | D oval 56,65 4,5",
    "cannon": "A poly 8,44 84,20 92,42 16,70 | B oval 36,72 21,21 | D oval 36,72 7,7",
    "trap": "B poly 2,72 98,72 98,84 2,84 | A poly 6,72 16,40 26,72 | A poly 28,72 38,40 48,72 | A poly 52,72 62,40 72,72"
    " | A poly 74,72 84,40 94,72",
}

HARMLESS: dict[str, str] = {
    "lamp": "A poly 32,8 68,8 88,48 12,48 | B poly 46,48 54,48 54,86 46,86 | B poly 26,86 74,86 74,95 26,95",
    "cup": "D ring 74,50 17,18 | A poly 14,22 70,22 62,88 22,88 | W poly 14,22 70,22 69,31 15,31",
    "flower": "D line 50,44 50,98 | A oval 50,14 12,14 | A oval 73,30 14,12 | A oval 64,54 12,13 | A oval 36,54 12,13"
    " | A oval 27,30 14,12 | B oval 50,36 11,11",
    "tree": "B poly 42,66 58,66 58,97 42,97 | A poly 50,22 92,68 8,68 | A poly 50,3 82,42 18,42",
    "house": "A poly 18,46 82,46 82,94 18,94 | B poly 6,48 50,8 94,48 | D poly 42,64 58,64 58,94 42,94",
    "book": "A poly 6,24 50,34 50,88 6,78 | B poly 50,34 94,24 94,78 50,88 | W line 14,42 42,48 | W line 14,58 42,64",
    "hat": "A poly 28,22 72,22 76,70 24,70 | B poly 25,54 75,54 76,68 24,68 | A poly 4,68 96,68 96,79 4,79",
    "fish": "A oval 42,50 34,22 | B poly 66,50 96,26 96,74 | W oval 24,44 6,6 | D oval 24,44 3,3",
    "apple": "A oval 36,60 24,30 | A oval 64,60 24,30 | D line 50,38 56,10 | B oval 72,18 15,8",
    "chair": "A poly 20,4 31,4 31,97 20,97 | A poly 69,54 80,54 80,97 69,97 | B poly 20,46 80,46 80,58 20,58 | A poly 20,4 31,4 31,14 20,14",
    "key": "A ring 24,50 18,18 | A line 42,50 96,50 | A line 76,50 76,72 | A line 93,50 93,72",
    "umbrella": "B line 50,46 50,90 40,96 32,88 | A poly 4,50 16,24 50,8 84,24 96,50 72,44 50,50 28,44",
    "boat": "D line 46,4 46,66 | A poly 4,66 96,66 78,92 22,92 | B poly 51,8 51,58 88,58 | W poly 41,18 41,58 14,58",
    "kite": "A poly 50,2 82,34 50,72 18,34 | D line 50,2 50,72 | D line 18,34 82,34 | B line 50,72 60,80 46,88 58,97",
    "car": "A poly 2,50 22,46 34,24 70,24 82,46 98,50 98,72 2,72 | W poly 38,30 66,30 74,46 30,46 | D oval 25,74 13,13 | D oval 75,74 13,13",
    "clock": "A oval 50,50 44,44 | W oval 50,50 34,34 | D line 50,50 50,24 | D line 50,50 70,60",
}

OBJECTS: tuple[str, ...] = (*DANGEROUS, *HARMLESS)
