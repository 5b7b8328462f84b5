//! Numbers of 8 bits: a sign, 4 bits of exponent, 3 of mantissa; no infinities, NaN is all ones (Micikevicius et al. 2022, E4M3).

/// The largest number.
pub const LARGEST: f32 = 448.0;

/// Moves an exponent of f32 to where that of these numbers begins: 2^-120 is exponent 127 - 120.
const DOWN: f32 = f32::from_bits(7 << 23);
const UP: f32 = f32::from_bits(247 << 23);

/// To nearest even; what is larger than [`LARGEST`] becomes it. As the kernels do it.
pub fn encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    if value.is_nan() {
        return sign | 0x7f;
    }
    // Scaled down, both kinds of numbers have their exponent in the same place, subnormal ones too.
    let bits = (value.abs().min(LARGEST) * DOWN).to_bits();
    sign | ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) as u8
}

/// Exactly.
pub fn decode(byte: u8) -> f32 {
    let magnitude = match byte & 0x7f {
        0x7f => f32::NAN,
        bits => f32::from_bits(u32::from(bits) << 20) * UP,
    };
    if byte < 0x80 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_own_numbers() {
        let table = [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xb9, -1.125),
        ];
        for (byte, value) in table {
            assert_eq!((decode(byte), encode(value)), (value, byte));
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan() && encode(f32::NAN) == 0x7f);
    }

    #[test]
    fn every_number_is_its_own_nearest_and_ties_go_to_even() {
        for byte in (0..=0xffu8).filter(|byte| byte & 0x7f != 0x7f) {
            assert_eq!(encode(decode(byte)), byte);
        }
        for low in 0..0x7eu8 {
            let (a, b) = (decode(low), decode(low + 1));
            let middle = (a + b) / 2.0;
            assert_eq!(encode(middle), if low % 2 == 0 { low } else { low + 1 }, "{middle}");
            assert_eq!((encode(middle * 0.999), encode(middle * 1.001)), (low, low + 1), "{middle}");
        }
        assert_eq!((encode(1e9), encode(f32::NEG_INFINITY)), (0x7e, 0xfe));
    }
}
