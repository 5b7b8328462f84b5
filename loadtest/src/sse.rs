//! Server-sent events, cut out of network reads wherever those happen to split.

/// Splits a byte stream into the payloads of its `data:` lines.
///
/// Our servers write one `data:` line per event, so a line is an event; comments, other fields and blank lines are
/// skipped. Bytes are copied only when a line straddles two reads.
#[derive(Debug, Default)]
pub struct DataLines {
    partial: Vec<u8>,
}

impl DataLines {
    /// Feeds one read and calls `each` with every payload that it completes.
    pub fn push(&mut self, mut read: &[u8], mut each: impl FnMut(&[u8])) {
        while let Some(end) = read.iter().position(|&byte| byte == b'\n') {
            let line = &read[..end];
            if self.partial.is_empty() {
                payload(line).into_iter().for_each(&mut each);
            } else {
                self.partial.extend_from_slice(line);
                payload(&self.partial).into_iter().for_each(&mut each);
                self.partial.clear();
            }
            read = &read[end + 1..];
        }
        self.partial.extend_from_slice(read);
    }

    /// Whether the stream stopped inside a line.
    pub fn has_partial_line(&self) -> bool {
        !self.partial.is_empty()
    }
}

fn payload(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let value = line.strip_prefix(b"data:")?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b": hello\r\ndata: {\"a\":\"\xC3\xA9\"}\r\n\r\nevent: x\ndata:{\"b\":2}\n\nid: 4\n\ndata: [DONE]\n\n";

    fn payloads(reads: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut lines, mut out) = (DataLines::default(), Vec::new());
        for read in reads {
            lines.push(read, |data| out.push(data.to_vec()));
        }
        assert!(!lines.has_partial_line());
        out
    }

    #[test]
    fn comments_other_fields_and_line_ends_are_left_out() {
        let expected: Vec<&[u8]> = vec![b"{\"a\":\"\xC3\xA9\"}", b"{\"b\":2}", b"[DONE]"];
        assert_eq!(payloads(&[STREAM]), expected);
    }

    #[test]
    fn every_way_to_cut_a_stream_in_three_gives_the_same_payloads() {
        let whole = payloads(&[STREAM]);
        for first in 0..STREAM.len() {
            for second in first..STREAM.len() {
                let cut = [&STREAM[..first], &STREAM[first..second], &STREAM[second..]];
                assert_eq!(payloads(&cut), whole, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn a_stream_that_ends_inside_a_line_is_noticed() {
        let mut lines = DataLines::default();
        lines.push(b"data: {\"a\"", |_| panic!("incomplete"));
        assert!(lines.has_partial_line());
    }
}
