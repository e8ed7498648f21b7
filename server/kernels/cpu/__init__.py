"""Operations compiled by Numba for the CPU that they run on: no compiler has to be installed. Same names as in
`reference`, whose plain torch defines them."""
