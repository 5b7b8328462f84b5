//! A wire to the database that can be cut or held.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wire {
    /// Bytes go through.
    Up,
    /// Connections are closed and new ones closed at once, as by a server that is stopped.
    Cut,
    /// Connections stay open and nothing comes through, as from a server that hangs.
    Held,
    /// The same, and connections with bytes under way never wake up: somewhere on the way they have been forgotten.
    Lost,
}

pub struct Proxy {
    pub address: String,
    wire: Arc<watch::Sender<Wire>>,
}

impl Proxy {
    /// To the host and port of a `postgres://` address.
    pub async fn to(url: &str) -> Self {
        let host = url.split_once('@').unwrap().1.split('/').next().unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = url.replace(&host, &listener.local_addr().unwrap().to_string());
        let wire = Arc::new(watch::Sender::new(Wire::Up));
        let state = wire.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, host.clone(), state.subscribe()));
            }
        });
        Self { address, wire }
    }

    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

async fn carry(client: TcpStream, host: String, mut wire: watch::Receiver<Wire>) {
    if *wire.borrow() == Wire::Cut {
        return;
    }
    let server = TcpStream::connect(host).await.unwrap();
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.into_split(), server.into_split());
    let mut up = wire.clone();
    let mut down = wire.clone();
    let both = async {
        tokio::select! {
            () = pump(&mut from_client, &mut to_server, &mut up) => {}
            () = pump(&mut from_server, &mut to_client, &mut down) => {}
        }
    };
    tokio::select! {
        () = both => {}
        _ = wire.wait_for(|wire| *wire == Wire::Cut) => {}
    }
}

async fn pump(
    from: &mut tokio::net::tcp::OwnedReadHalf,
    to: &mut tokio::net::tcp::OwnedWriteHalf,
    wire: &mut watch::Receiver<Wire>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = match tokio::io::AsyncReadExt::read(from, &mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        let state = match wire.wait_for(|wire| *wire != Wire::Held).await {
            Ok(state) => *state,
            Err(_) => return,
        };
        if state == Wire::Lost {
            return std::future::pending().await;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Waits until `check` holds.
pub async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    for _ in 0..1200 {
        if check().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("after two minutes still not: {what}");
}
