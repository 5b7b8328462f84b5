//! Server-sent events out of bytes as they come. Pure.

/// Most bytes of one event. Twenty alternatives for a chunk of tokens are some KiB.
const LONGEST: usize = 4 << 20;

/// What has come and is not read yet.
#[derive(Debug, Default)]
pub struct SseReader {
    bytes: Vec<u8>,
    /// Of `bytes`, what was read.
    read: usize,
    /// Data of the event that is under way.
    data: Vec<u8>,
    begun: bool,
}

/// An event never ends.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

impl SseReader {
    /// More has come.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        self.bytes.drain(..self.read);
        self.read = 0;
        if self.bytes.len() + self.data.len() + bytes.len() > LONGEST {
            return Err(TooLong);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// The data of the next whole event.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = self.bytes.get(self.read..)?;
            let end = rest.iter().position(|byte| *byte == b'\n')?;
            let line = rest.get(..end).unwrap_or_default().to_vec();
            self.read += end + 1;
            if let Some(data) = self.line(&line) {
                return Some(data);
            }
        }
    }

    /// The stream is over: the last event may lack its empty line.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        let line = self.bytes.get(self.read..).unwrap_or_default().to_vec();
        self.read = self.bytes.len();
        self.line(&line).or_else(|| self.event())
    }

    fn line(&mut self, line: &[u8]) -> Option<Vec<u8>> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            return self.event();
        }
        // Names, ids and comments say nothing that the data does not.
        if let Some(data) = line.strip_prefix(b"data:") {
            if self.begun {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            self.begun = true;
        }
        None
    }

    fn event(&mut self) -> Option<Vec<u8>> {
        std::mem::take(&mut self.begun).then(|| std::mem::take(&mut self.data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = ": hello\r\n\r\ndata: {\"a\":1}\n\nevent: x\ndata:{\"b\":\ndata: 2}\r\n\r\n\n\nid: 7\n\ndata: [DONE]\n";

    fn read(pieces: &[&[u8]]) -> Vec<String> {
        let mut reader = SseReader::default();
        let mut events = Vec::new();
        for piece in pieces {
            reader.push(piece).unwrap();
            while let Some(event) = reader.next() {
                events.push(String::from_utf8(event).unwrap());
            }
        }
        events.extend(reader.finish().map(|event| String::from_utf8(event).unwrap()));
        events
    }

    #[test]
    fn comments_names_and_both_line_ends_are_read() {
        assert_eq!(read(&[STREAM.as_bytes()]), ["{\"a\":1}", "{\"b\":\n2}", "[DONE]"]);
        assert_eq!(read(&[b"data: x"]), ["x"]);
        assert!(read(&[b"data"]).is_empty() && read(&[]).is_empty());
    }

    #[test]
    fn an_event_without_an_end_is_given_up() {
        let mut reader = SseReader::default();
        reader.push(b"data: ").unwrap();
        let piece = vec![b'x'; 1 << 20];
        assert!((0..5).any(|_| reader.push(&piece).is_err()));
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(cuts in proptest::collection::vec(0..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let ends = cuts.iter().copied().chain([STREAM.len()]);
            let starts = [0].into_iter().chain(cuts.iter().copied());
            let pieces: Vec<&[u8]> = starts.zip(ends).map(|(start, end)| &STREAM.as_bytes()[start..end]).collect();
            prop_assert_eq!(read(&pieces), read(&[STREAM.as_bytes()]));
        }
    }
}
