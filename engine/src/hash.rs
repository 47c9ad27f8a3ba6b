//! FNV-1a: 64 bits that are the same everywhere and always, and differ where bytes do. Good against mistakes, not against malice.

/// Of some bytes.
pub fn of(bytes: &[u8]) -> u64 {
    and(0xcbf2_9ce4_8422_2325, bytes)
}

/// Of what `hash` is of, followed by these bytes.
pub fn and(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    /// Test vectors of the function's authors.
    #[test]
    fn it_is_fnv_1a() {
        for (text, hash) in
            [("", 0xcbf2_9ce4_8422_2325_u64), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
        {
            assert_eq!(super::of(text.as_bytes()), hash);
        }
    }
}
