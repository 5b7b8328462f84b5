//! `/v1/files` through the real router: streamed to the disk, bounded, and each key's own.

#![cfg(test)]

use crate::support::{Reply, Setup, get, send};
use axum::Router;
use axum::body::Body;
use hyper::Request;
use serde_json::Value;
use tidemill::http::router;
use tidemill_store::Scope;

const BOUNDARY: &str = "frontier";

/// A form of named values and a file.
fn form(fields: &[(&str, &str)], file: Option<(&str, &[u8])>) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in fields {
        body.extend(format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n").bytes());
    }
    if let Some((name, content)) = file {
        body.extend(
            format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n").bytes(),
        );
        body.extend(content);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").bytes());
    body
}

fn request(method: &str, path: &str, key: Option<&str>) -> hyper::http::request::Builder {
    let builder = Request::builder().method(method).uri(path);
    match key {
        Some(key) => builder.header("authorization", format!("Bearer {key}")),
        None => builder,
    }
}

async fn upload(router: &Router, body: Vec<u8>, key: Option<&str>) -> Reply {
    let request = request("POST", "/v1/files", key).header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
    send(router, request.body(Body::from(body)).unwrap()).await
}

async fn uploaded(router: &Router, content: &[u8], key: Option<&str>) -> Value {
    let reply = upload(router, form(&[("purpose", "batch")], Some(("in.jsonl", content))), key).await;
    assert_eq!(reply.status, 200, "{}", reply.json());
    reply.json()
}

async fn call(router: &Router, method: &str, path: &str, key: &str) -> Reply {
    send(router, request(method, path, Some(key)).body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn a_file_comes_back_as_it_was_sent_and_goes_when_it_is_deleted() {
    let app = Setup::default().app();
    let (files, router) = (app.files.clone(), router(app));
    let content: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let file = uploaded(&router, &content, None).await;
    let id = file["id"].as_str().unwrap();
    assert_eq!((&file["bytes"], &file["filename"], &file["purpose"]), (&300_000.into(), &"in.jsonl".into(), &"batch".into()));
    // Thirty days.
    assert_eq!(file["expires_at"].as_i64().unwrap() - file["created_at"].as_i64().unwrap(), 2_592_000);
    let whole = get(&router, &format!("/v1/files/{id}/content")).await;
    assert_eq!((whole.headers["content-length"].to_str().unwrap(), whole.body == content), ("300000", true));
    assert_eq!(get(&router, &format!("/v1/files/{id}")).await.json(), file);
    let path = files.path(id.strip_prefix("file-").unwrap().parse().unwrap());
    assert!(path.exists());
    let deleted = send(&router, request("DELETE", &format!("/v1/files/{id}"), None).body(Body::empty()).unwrap()).await;
    assert_eq!(deleted.json(), serde_json::json!({"id": id, "object": "file", "deleted": true}));
    assert!(!path.exists());
    for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content"), "/v1/files/nonsense".into()] {
        assert_eq!(get(&router, &path).await.error().0, 404);
    }
}

#[tokio::test]
async fn lists_go_page_by_page_in_both_orders() {
    let router = Setup::default().router();
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(uploaded(&router, b"x", None).await["id"].as_str().unwrap().to_owned());
    }
    let page = async |query: &str| {
        let page = get(&router, &format!("/v1/files?{query}")).await.json();
        let ids: Vec<String> =
            page["data"].as_array().unwrap().iter().map(|file| file["id"].as_str().unwrap().to_owned()).collect();
        (ids, page["has_more"].as_bool().unwrap())
    };
    assert_eq!(page("order=asc&limit=3").await, (ids[..3].to_vec(), true));
    assert_eq!(page(&format!("order=asc&limit=3&after={}", ids[2])).await, (ids[3..].to_vec(), false));
    let newest_first: Vec<String> = ids.iter().rev().cloned().collect();
    assert_eq!(page("").await, (newest_first, false));
    assert_eq!(page("purpose=user_data").await, (Vec::new(), false));
    for (query, param) in [("after=7", "after"), ("order=up", "order"), ("limit=10001", "limit"), ("colour=1", "colour")] {
        assert_eq!(get(&router, &format!("/v1/files?{query}")).await.error().1.as_deref(), Some(param));
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_form_is_said_and_leaves_nothing_on_the_disk() {
    let app = Setup::default().app();
    let (files, router) = (app.files.clone(), router(app));
    let file = Some(("a", b"x".as_slice()));
    let (batch, anchor) = (("purpose", "batch"), ("expires_after[anchor]", "created_at"));
    for (body, param) in [
        (form(&[], file), Some("purpose")),
        (form(&[batch], None), Some("file")),
        (form(&[("purpose", "vision")], file), Some("purpose")),
        (form(&[batch, ("colour", "red")], file), Some("colour")),
        (form(&[batch, anchor], file), Some("expires_after[seconds]")),
        (form(&[batch, anchor, ("expires_after[seconds]", "60")], file), Some("expires_after[seconds]")),
        (form(&[batch], Some((&"x".repeat(600), b"x"))), Some("file")),
        (form(&[batch], Some(("a\u{7}", b"x"))), None),
        (b"--frontier\r\nnonsense".to_vec(), None),
    ] {
        let (status, named, _) = upload(&router, body, None).await.error();
        assert_eq!((status, named.as_deref()), (400, param));
    }
    let plain = send(&router, request("POST", "/v1/files", None).body(Body::from("{}")).unwrap()).await;
    assert_eq!(plain.error().0, 400);
    // The limits of this server are 1 MiB a file and 3 MiB in all.
    let big = vec![b'x'; (1 << 20) + 1];
    let (status, _, code) = upload(&router, form(&[batch], Some(("a", &big))), None).await.error();
    assert_eq!((status, code.as_deref()), (413, Some("file_too_large")));
    for _ in 0..3 {
        uploaded(&router, &big[..(1 << 20) - 1], None).await;
    }
    let (status, _, code) = upload(&router, form(&[batch], Some(("a", &big[..100]))), None).await.error();
    assert_eq!((status, code.as_deref()), (413, Some("files_full")));
    let folder = files.path(uuid::Uuid::nil()).parent().unwrap().to_owned();
    // The three files and the directory's name.
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 4);
}

#[tokio::test]
async fn a_key_sees_its_own_files_and_an_admin_all() {
    let app = Setup::default().app();
    let mut keys = Vec::new();
    for (name, scope) in [("a", Scope::Chat), ("b", Scope::Chat), ("admin", Scope::Admin), ("labels", Scope::Label)] {
        keys.push(app.store.create_key(name, &[scope]).await.unwrap().1);
    }
    let router = router(app);
    let file = uploaded(&router, b"secret", Some(&keys[0])).await;
    let (path, content) = (format!("/v1/files/{}", file["id"].as_str().unwrap()), b"secret".as_slice());
    for (key, sees) in [(&keys[0], true), (&keys[1], false), (&keys[2], true)] {
        assert_eq!(call(&router, "GET", &path, key).await.status.as_u16(), if sees { 200 } else { 404 });
        assert_eq!(call(&router, "GET", &format!("{path}/content"), key).await.body == content, sees);
        let listed = call(&router, "GET", "/v1/files", key).await.json()["data"].as_array().unwrap().len();
        assert_eq!(listed, usize::from(sees));
    }
    assert_eq!(call(&router, "DELETE", &path, &keys[1]).await.error().0, 404);
    assert_eq!(call(&router, "GET", &path, &keys[3]).await.error().0, 403);
    assert_eq!(call(&router, "DELETE", &path, &keys[0]).await.status, 200);
}
