//! Pages for browsers of this machine alone, behind a token in their address.

use std::fmt::Write;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, anyhow};
use tiny_http::{Header, Method, Request, Response, Server, StatusCode};

use crate::terminal::{note, say};

/// Requests that are answered at once.
const THREADS: usize = 4;

/// An answer before it goes out.
pub struct Answer {
    status: u16,
    kind: &'static str,
    body: Vec<u8>,
    /// Tells this content from another.
    tag: Option<String>,
}

impl Answer {
    /// A refusal, with its reason.
    pub fn refused(status: u16, why: &str) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: format!("{why}\n").into_bytes(), tag: None }
    }

    /// Content of a media type.
    pub fn of(kind: &'static str, body: Vec<u8>) -> Self {
        Self { status: 200, kind, body, tag: None }
    }

    /// The same with a tag: who has that content already is not sent it again.
    pub fn tagged(self, tag: String) -> Self {
        Self { tag: Some(tag), ..self }
    }
}

/// Prints the address and serves until it is ended. `answer` is asked for what stands behind the token, nothing for the page itself.
pub fn serve(port: u16, answer: impl Fn(&str) -> Answer + Sync) -> Result<()> {
    let server = Server::http((Ipv4Addr::LOCALHOST, port));
    let server = server.map_err(|error| anyhow!("port {port} of 127.0.0.1: {error}; choose another --port"))?;
    let port = server.server_addr().to_ip().context("the server has no port")?.port();
    let site = Site { token: token()?, port, answer };
    say!("http://127.0.0.1:{port}/{}/", site.token);
    note!("the page is for this machine's browsers; Ctrl-C ends it, and no run");
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| server.incoming_requests().for_each(|request| site.serve(request)));
        }
    });
    Ok(())
}

/// What nobody can guess who was not told.
fn token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("the system gives no random numbers: {error}"))?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// What there is behind the address.
struct Site<F> {
    token: String,
    port: u16,
    answer: F,
}

impl<F: Fn(&str) -> Answer> Site<F> {
    fn serve(&self, request: Request) {
        let header = |name: &str| {
            let found = request.headers().iter().find(|header| header.field.to_string().eq_ignore_ascii_case(name));
            found.map(|header| header.value.to_string())
        };
        let known = header("If-None-Match");
        let mut answer = match request.method() {
            Method::Get | Method::Head => self.answer(request.url(), header("Host").as_deref()),
            _ => Answer::refused(405, "this page is only read"),
        };
        if answer.tag.is_some() && answer.tag == known {
            (answer.status, answer.body) = (304, Vec::new());
        }
        let mut response = Response::from_data(answer.body).with_status_code(StatusCode(answer.status));
        let mut headers = vec![
            ("Content-Type", answer.kind),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            // Alone in its process, a page may share memory with its workers.
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Embedder-Policy", "require-corp"),
        ];
        headers.extend(answer.tag.as_deref().map(|tag| ("ETag", tag)));
        for (name, value) in headers {
            if let Ok(header) = Header::from_bytes(name, value) {
                response.add_header(header);
            }
        }
        // A reader that went away is no matter.
        let _ = request.respond(response);
    }

    /// What a path of the address gives. Other hosts' names are refused: a page of theirs that was made to lead here by their name
    /// server would read along.
    fn answer(&self, url: &str, host: Option<&str>) -> Answer {
        let own = |name: &str| host == Some(&*format!("{name}:{}", self.port));
        if !own("127.0.0.1") && !own("localhost") {
            return Answer::refused(403, "this page is for the machine that it runs on");
        }
        let path = url.split('?').next().unwrap_or_default();
        let mut parts = path.trim_start_matches('/').splitn(2, '/');
        if !parts.next().is_some_and(|token| same(token, &self.token)) {
            return Answer::refused(404, "the address needs the token that was printed");
        }
        match parts.next() {
            // Relative addresses of the page need the slash.
            None => Answer::refused(404, "the address ends in a slash"),
            Some(path) => (self.answer)(path),
        }
    }
}

/// Whether two texts are the same, in a time that does not say how far they are.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}
