//! `Gateway`: the data path of a gateway daemon.

use crate::ids::{hex, parse_id};
use hci_engine_core::gateway::{Command, Gateway as Core, GatewayEvent};
use hci_engine_core::geometry::{Geometry, SnapshotId};
use hci_engine_core::io::{Address, TlsConfig};
use hci_engine_core::nbd::budget::ClientLimits;
use hci_engine_core::nbd::{Answer, ExportInfo, Query, TlsMode};
use hci_engine_core::replica::{
    Event, HealLimits, HealSpec, HealState, Layering, LevelState, LinkTarget, NodeMask, OpenSpec,
    PeekedRecord, ReaderSpec, RotState, ScrubSpec, ScrubState, SetSpec,
};
use hci_engine_core::store::Chain;
use hci_engine_core::wire::messages::HelloReply;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

/// The event loop of a gateway. Every method returns at once; what comes of it is told by
/// `next_event`.
#[pyclass(module = "engine._engine", frozen)]
pub struct Gateway {
    core: std::sync::Mutex<Option<Core>>,
}

impl Gateway {
    fn order(&self, command: Command) -> PyResult<()> {
        self.with(|core| core.order(command))
    }

    fn with<T>(&self, act: impl FnOnce(&Core) -> T) -> PyResult<T> {
        let core = self.core.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        core.as_ref().map(act).ok_or_else(|| PyRuntimeError::new_err("the gateway is stopped"))
    }
}

#[pymethods]
impl Gateway {
    #[new]
    #[pyo3(signature = (*, poll_us=0))]
    fn new(poll_us: u64) -> PyResult<Self> {
        let core = Core::start(Duration::from_micros(poll_us))?;
        Ok(Gateway { core: std::sync::Mutex::new(Some(core)) })
    }

    /// Takes over a listening socket, by descriptor.
    #[pyo3(signature = (fd, tls="off"))]
    fn listen(&self, fd: i32, tls: &str) -> PyResult<()> {
        if fd < 0 {
            return Err(PyValueError::new_err("no descriptor"));
        }
        let tls = match tls {
            "off" => TlsMode::Off,
            "optional" => TlsMode::Optional,
            "required" => TlsMode::Required,
            _ => return Err(PyValueError::new_err(format!("no such way of TLS: {tls}"))),
        };
        // SAFETY: the caller hands the descriptor over and does not use it again.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        self.order(Command::Listen(fd, tls))
    }

    /// Connections that begin with TLS from now on show this certificate; all in PEM.
    #[pyo3(signature = (*, certificate, key, client_authorities=None))]
    fn set_tls(
        &self,
        certificate: &[u8],
        key: &[u8],
        client_authorities: Option<&[u8]>,
    ) -> PyResult<()> {
        let config = TlsConfig::new(certificate, key, client_authorities)
            .map_err(|bad| PyValueError::new_err(bad.0))?;
        self.order(Command::Tls(config))
    }

    #[pyo3(signature = (*, clients, client_bytes, total_bytes, handshake_ms, idle_ms))]
    fn limit(
        &self,
        clients: usize,
        client_bytes: u64,
        total_bytes: u64,
        handshake_ms: u64,
        idle_ms: u64,
    ) -> PyResult<()> {
        let ns = |ms: u64| ms.saturating_mul(1_000_000);
        self.order(Command::Limit(ClientLimits {
            clients,
            client_bytes,
            bytes: total_bytes,
            handshake_ns: ns(handshake_ms),
            idle_ns: ns(idle_ms),
        }))
    }

    #[pyo3(signature = (node, *, cluster, gateway, address, socket=None))]
    fn link(
        &self,
        node: String,
        cluster: &str,
        gateway: String,
        address: &str,
        socket: Option<String>,
    ) -> PyResult<()> {
        let mut addresses: Vec<Address> =
            socket.into_iter().map(|s| Address::Unix(s.into())).collect();
        let tcp = address.parse().map_err(|_| {
            PyValueError::new_err(format!("'{address}' is not an address and port"))
        })?;
        addresses.push(Address::Tcp(tcp));
        let cluster = parse_id(cluster)?.0;
        self.order(Command::Link(LinkTarget { node, addresses, cluster, gateway }))
    }

    fn unlink(&self, node: String) -> PyResult<()> {
        self.order(Command::Unlink(node))
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (channel, *, image, size_bytes, shard_bytes, placement_key, layers, snapshots,
                        merging, epoch, holder, generation, digest, body, nodes, sets, in_sync, local=None,
                        levelling=None))]
    fn open(
        &self,
        channel: u32,
        image: &str,
        size_bytes: u64,
        shard_bytes: u32,
        placement_key: &str,
        layers: Vec<u32>,
        snapshots: Vec<(u32, u64)>,
        merging: Vec<u32>,
        epoch: u64,
        holder: &str,
        generation: u64,
        digest: [u8; 32],
        body: Vec<u8>,
        nodes: Vec<String>,
        sets: Vec<Vec<u8>>,
        in_sync: Vec<Vec<u8>>,
        local: Option<u8>,
        levelling: Option<(u64, usize, u64)>,
    ) -> PyResult<()> {
        let spec = open_spec(
            channel,
            image,
            size_bytes,
            shard_bytes,
            placement_key,
            layering(layers, &snapshots, merging)?,
            epoch,
            holder,
            generation,
            digest,
            body,
            nodes,
            sets,
            in_sync,
            local,
            levelling,
        )?;
        self.order(Command::Open(spec))
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (channel, *, image, size_bytes, shard_bytes, placement_key, snapshot,
                        nodes, sets, in_sync, local=None))]
    fn open_reader(
        &self,
        channel: u32,
        image: &str,
        size_bytes: u64,
        shard_bytes: u32,
        placement_key: &str,
        snapshot: (u32, u64),
        nodes: Vec<String>,
        sets: Vec<Vec<u8>>,
        in_sync: Vec<Vec<u8>>,
        local: Option<u8>,
    ) -> PyResult<()> {
        let geometry = geometry_of(size_bytes, shard_bytes, placement_key, sets.len())?;
        let spec = reader_spec(channel, image, geometry, snapshot, nodes, &sets, &in_sync, local)?;
        self.order(Command::OpenReader(spec))
    }

    fn peek(&self, channel: u32, node: u8) -> PyResult<()> {
        self.order(Command::Peek { channel, node })
    }

    #[pyo3(signature = (channel, nodes, *, resume))]
    fn admit(&self, channel: u32, nodes: Vec<(u8, u64)>, resume: bool) -> PyResult<()> {
        self.order(Command::Admit { channel, nodes, resume })
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (channel, *, generation, digest, body, in_sync, layers, snapshots,
                        merging))]
    fn reconfigure(
        &self,
        channel: u32,
        generation: u64,
        digest: [u8; 32],
        body: Vec<u8>,
        in_sync: Vec<Vec<u8>>,
        layers: Vec<u32>,
        snapshots: Vec<(u32, u64)>,
        merging: Vec<u32>,
    ) -> PyResult<()> {
        self.order(Command::Reconfigure {
            channel,
            generation,
            digest,
            body: body.into(),
            in_sync: in_sync.iter().map(|nodes| mask(nodes)).collect::<PyResult<_>>()?,
            layering: layering(layers, &snapshots, merging)?,
        })
    }

    fn ask_emptied(&self, channel: u32) -> PyResult<()> {
        self.order(Command::AskEmptied { channel })
    }

    /// Has what clients change wait for a snapshot, until `frozen` or `freeze_failed`.
    fn freeze(&self, channel: u32, attempt: u64) -> PyResult<()> {
        self.order(Command::Freeze { channel, attempt })
    }

    fn thaw(&self, channel: u32, attempt: u64) -> PyResult<()> {
        self.order(Command::Thaw { channel, attempt })
    }

    fn refuse_writes(&self, channel: u32, sets: Vec<usize>) -> PyResult<()> {
        self.order(Command::RefuseWrites { channel, sets })
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (channel, *, node, serial, attempt, sets, bytes_per_second, shards_at_once,
                        share_percent))]
    fn heal(
        &self,
        channel: u32,
        node: u8,
        serial: u64,
        attempt: u64,
        sets: Vec<(usize, u64)>,
        bytes_per_second: u64,
        shards_at_once: usize,
        share_percent: u64,
    ) -> PyResult<()> {
        let limits = HealLimits { bytes_per_second, shards_at_once, share_percent };
        let spec = HealSpec { node, serial, attempt, sets, limits };
        self.order(Command::Heal { channel, spec })
    }

    fn writes_lost(&self, channel: u32, sets: Vec<usize>) -> PyResult<()> {
        self.order(Command::WritesLost { channel, sets })
    }

    fn end_heal(&self, channel: u32, attempt: u64) -> PyResult<()> {
        self.order(Command::EndHeal { channel, attempt })
    }

    /// Reads and compares all replicas from a shard on, until `scrub_ended`.
    #[pyo3(signature = (channel, *, attempt, from_shard, end_shard, bytes_per_second,
                        share_percent))]
    fn scrub(
        &self,
        channel: u32,
        attempt: u64,
        from_shard: u64,
        end_shard: Option<u64>,
        bytes_per_second: u64,
        share_percent: u64,
    ) -> PyResult<()> {
        let spec = ScrubSpec { attempt, from_shard, end_shard, bytes_per_second, share_percent };
        self.order(Command::Scrub { channel, spec })
    }

    fn end_scrub(&self, channel: u32, attempt: u64) -> PyResult<()> {
        self.order(Command::EndScrub { channel, attempt })
    }

    fn set_lease_deadline(&self, channel: u32, deadline_ns: u64) -> PyResult<()> {
        self.order(Command::LeaseDeadline { channel, deadline_ns })
    }

    fn close(&self, channel: u32) -> PyResult<()> {
        self.order(Command::Close { channel })
    }

    fn kill(&self, channel: u32) -> PyResult<()> {
        self.order(Command::Kill { channel })
    }

    fn forget(&self, channel: u32) -> PyResult<()> {
        self.order(Command::Forget { channel })
    }

    /// Connections that arrive from now on wait in the socket.
    fn stop_listening(&self) -> PyResult<()> {
        self.order(Command::StopListening)
    }

    /// Ends the connections of an image's clients, without answering what they have in flight.
    fn disconnect(&self, channel: u32) -> PyResult<()> {
        self.order(Command::Disconnect { channel })
    }

    /// Ends them, each when what it has asked for is answered.
    fn reconnect(&self, channel: u32) -> PyResult<()> {
        self.order(Command::Reconnect { channel })
    }

    /// The image has another size; clients that connect from now on see it.
    fn resize(&self, channel: u32, size_bytes: u64, body: Vec<u8>) -> PyResult<()> {
        self.order(Command::Resize { channel, size_bytes, body: body.into() })
    }

    fn zero(&self, channel: u32, offset: u64, length: u64) -> PyResult<()> {
        self.order(Command::Zero { channel, offset, length })
    }

    fn answer_names(&self, client: u64, names: Vec<String>) -> PyResult<()> {
        self.order(Command::Answer { client, answer: Answer::Names(names), channel: None })
    }

    #[pyo3(signature = (client, *, name, size_bytes, read_only, channel=None))]
    fn answer_export(
        &self,
        client: u64,
        name: String,
        size_bytes: u64,
        read_only: bool,
        channel: Option<u32>,
    ) -> PyResult<()> {
        let description = String::new();
        // A flush goes to every node that has had a write on any connection.
        let export = ExportInfo { name, size_bytes, read_only, multi_conn: true, description };
        self.order(Command::Answer { client, answer: Answer::Export(export), channel })
    }

    /// Name, layer and generation of each snapshot that the export can be compared with.
    fn answer_snapshots(&self, client: u64, snapshots: Vec<(String, u32, u64)>) -> PyResult<()> {
        let snapshots = snapshots.into_iter();
        let snapshots = snapshots
            .map(|(name, layer, generation)| (name, SnapshotId { layer, generation }))
            .collect();
        self.order(Command::Answer { client, answer: Answer::Snapshots(snapshots), channel: None })
    }

    /// `kind`: "unknown", "refused" or "unavailable".
    fn answer_error(&self, client: u64, kind: &str, message: String) -> PyResult<()> {
        let answer = match kind {
            "unknown" => Answer::Unknown(message),
            "refused" => Answer::Refused(message),
            "unavailable" => Answer::Unavailable(message),
            _ => return Err(PyValueError::new_err(format!("no such kind of answer: {kind}"))),
        };
        self.order(Command::Answer { client, answer, channel: None })
    }

    /// The next event as a dict with `event`, its name, or None within `timeout_ms`.
    fn next_event<'py>(
        &self,
        py: Python<'py>,
        timeout_ms: u64,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let timeout = Duration::from_millis(timeout_ms);
        let events = self.with(Core::event_source)?;
        let event = py.detach(|| events.next(timeout));
        if event.is_none() && !self.with(Core::is_running)? {
            return Err(PyRuntimeError::new_err("the gateway's event loop has ended"));
        }
        event.map(|event| event_dict(py, event)).transpose()
    }

    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let snapshot = py.detach(|| self.with(Core::snapshot))?;
        let snapshot =
            snapshot.ok_or_else(|| PyRuntimeError::new_err("the event loop does not answer"))?;
        let result = PyDict::new(py);
        let links = snapshot.links.into_iter().map(|link| (link.node, link.ready));
        result.set_item("links", links.collect::<Vec<_>>())?;
        let clients = snapshot.clients.into_iter().map(|client| (client.id, client.channel));
        result.set_item("clients", clients.collect::<Vec<_>>())?;
        result.set_item("refused_clients", snapshot.refused_clients)?;
        result.set_item("bytes_in_flight", snapshot.bytes_in_flight)?;
        let mut images = Vec::new();
        for image in snapshot.images {
            let item = PyDict::new(py);
            item.set_item("channel", image.channel)?;
            item.set_item("image", image.image)?;
            item.set_item("running", image.running)?;
            item.set_item("epoch", image.epoch)?;
            item.set_item("generation", image.generation)?;
            item.set_item("requests_in_flight", image.requests_in_flight)?;
            item.set_item("replicas", image.replicas)?;
            let heal = image.heal.map(|heal| heal_dict(py, heal)).transpose()?;
            item.set_item("heal", heal)?;
            let level = image.level.map(|level| level_dict(py, level)).transpose()?;
            item.set_item("level", level)?;
            let scrub = image.scrub.map(|scrub| scrub_dict(py, scrub)).transpose()?;
            item.set_item("scrub", scrub)?;
            item.set_item("rot", rot_dict(py, image.rot)?)?;
            item.set_item("counters", HashMap::from(image.counters.named()))?;
            images.push(item);
        }
        result.set_item("images", images)?;
        let mut readers = Vec::new();
        for reader in snapshot.readers {
            let item = PyDict::new(py);
            item.set_item("channel", reader.channel)?;
            item.set_item("image", reader.image)?;
            item.set_item("snapshot", (reader.snapshot.layer, reader.snapshot.generation))?;
            item.set_item("running", reader.running)?;
            item.set_item("requests_in_flight", reader.requests_in_flight)?;
            item.set_item("nodes", reader.nodes)?;
            item.set_item("counters", HashMap::from(reader.counters.named()))?;
            readers.push(item);
        }
        result.set_item("readers", readers)?;
        Ok(result)
    }

    fn stop(&self, py: Python<'_>) {
        let core = self.core.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        py.detach(|| drop(core));
    }
}

/// What `open` says, as the engine takes it.
#[expect(clippy::too_many_arguments, reason = "those of `open`")]
pub(crate) fn open_spec(
    channel: u32,
    image: &str,
    size_bytes: u64,
    shard_bytes: u32,
    placement_key: &str,
    Layering { layers, snapshots, merging }: Layering,
    epoch: u64,
    holder: &str,
    generation: u64,
    digest: [u8; 32],
    body: Vec<u8>,
    nodes: Vec<String>,
    sets: Vec<Vec<u8>>,
    in_sync: Vec<Vec<u8>>,
    local: Option<u8>,
    levelling: Option<(u64, usize, u64)>,
) -> PyResult<OpenSpec> {
    let (bytes_per_second, shards_at_once, share_percent) = levelling.unwrap_or((0, 4, 100));
    check_sets(&nodes, &sets, &in_sync)?;
    let geometry = geometry_of(size_bytes, shard_bytes, placement_key, sets.len())?;
    let sets = sets
        .iter()
        .zip(&in_sync)
        .map(|(members, in_sync)| Ok(SetSpec { members: mask(members)?, in_sync: mask(in_sync)? }));
    Ok(OpenSpec {
        image: parse_id(image)?,
        channel,
        geometry,
        layers,
        snapshots,
        merging,
        epoch,
        holder: parse_id(holder)?.0,
        generation,
        digest,
        body: body.into(),
        nodes,
        sets: sets.collect::<PyResult<_>>()?,
        local,
        levelling: HealLimits { bytes_per_second, shards_at_once, share_percent },
    })
}

/// What `open_reader` says, as the engine takes it.
#[expect(clippy::too_many_arguments, reason = "those of `open_reader`")]
pub(crate) fn reader_spec(
    channel: u32,
    image: &str,
    geometry: Geometry,
    (layer, generation): (u32, u64),
    nodes: Vec<String>,
    sets: &[Vec<u8>],
    in_sync: &[Vec<u8>],
    local: Option<u8>,
) -> PyResult<ReaderSpec> {
    check_sets(&nodes, sets, in_sync)?;
    Ok(ReaderSpec {
        image: parse_id(image)?,
        channel,
        geometry,
        snapshot: SnapshotId { layer, generation },
        nodes,
        sets: in_sync.iter().map(|nodes| mask(nodes)).collect::<PyResult<_>>()?,
        local,
    })
}

pub(crate) fn geometry_of(
    size_bytes: u64,
    shard_bytes: u32,
    placement_key: &str,
    sets: usize,
) -> PyResult<Geometry> {
    let placement_key = parse_id(placement_key)?;
    Ok(Geometry { size_bytes, shard_bytes, placement_key, replica_sets: sets as u32 })
}

fn check_sets(nodes: &[String], sets: &[Vec<u8>], in_sync: &[Vec<u8>]) -> PyResult<()> {
    let fits = nodes.len() <= 64 && sets.len() == in_sync.len() && !sets.is_empty();
    let known = in_sync.iter().chain(sets).flatten().all(|node| usize::from(*node) < nodes.len());
    match fits && known {
        true => Ok(()),
        false => Err(PyValueError::new_err("at most 64 nodes, and one in_sync for each set")),
    }
}

/// What `layers`, `snapshots` (layer and generation of each) and `merging` say.
pub(crate) fn layering(
    layers: Vec<u32>,
    snapshots: &[(u32, u64)],
    merging: Vec<u32>,
) -> PyResult<Layering> {
    if Chain::new(&layers).is_none() {
        return Err(PyValueError::new_err("layers are ids that fall, at least one"));
    }
    let snapshot =
        |(layer, generation): &(u32, u64)| SnapshotId { layer: *layer, generation: *generation };
    let snapshots = snapshots.iter().map(snapshot).collect();
    let layering = Layering { layers, snapshots, merging };
    match layering.merges_fit() {
        true => Ok(layering),
        false => Err(PyValueError::new_err(
            "layers that are merged are below the top one, fall, and have no snapshot",
        )),
    }
}

pub(crate) fn mask(nodes: &[u8]) -> PyResult<NodeMask> {
    nodes.iter().try_fold(NodeMask::EMPTY, |mask, node| match node {
        0..64 => Ok(mask.with(NodeMask::one(*node))),
        _ => Err(PyValueError::new_err("an image spreads over at most 64 nodes")),
    })
}

pub(crate) fn event_dict(py: Python<'_>, event: GatewayEvent) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    match event {
        GatewayEvent::Asked { client, peer, trusted, certificate, query } => {
            let (query, name) = match query {
                Query::List => ("list", None),
                Query::Info { name } => ("info", Some(name)),
                Query::Go { name } => ("go", Some(name)),
                Query::ExportName { name } => ("export_name", Some(name)),
                Query::Snapshots { name } => ("snapshots", Some(name)),
            };
            dict.set_item("event", "asked")?;
            dict.set_item("client", client)?;
            dict.set_item("peer", peer)?;
            let certificate = certificate.map(|der| PyBytes::new(py, &der));
            dict.set_item("certificate", certificate)?;
            dict.set_item("trusted", trusted)?;
            dict.set_item("query", query)?;
            dict.set_item("name", name)?;
        }
        GatewayEvent::TlsRefused { why } => {
            dict.set_item("event", "tls_refused")?;
            dict.set_item("why", why)?;
        }
        GatewayEvent::ClientGone { client, channel } => {
            dict.set_item("event", "client_gone")?;
            dict.set_item("client", client)?;
            dict.set_item("channel", channel)?;
        }
        GatewayEvent::LinkUp { hello } => {
            dict.set_item("event", "link_up")?;
            put_hello(&dict, &hello)?;
        }
        GatewayEvent::LinkDown { node, why } => {
            dict.set_item("event", "link_down")?;
            dict.set_item("node", node)?;
            dict.set_item("why", why)?;
        }
        GatewayEvent::Zeroed { channel, done } => {
            dict.set_item("event", "zeroed")?;
            dict.set_item("channel", channel)?;
            dict.set_item("done", done)?;
        }
        GatewayEvent::Image { channel, event, hello } => {
            dict.set_item("channel", channel)?;
            put_image_event(py, &dict, event)?;
            if let Some(hello) = hello {
                put_hello(&dict, &hello)?;
            }
        }
    }
    Ok(dict)
}

fn put_hello(dict: &Bound<'_, PyDict>, hello: &HelloReply) -> PyResult<()> {
    dict.set_item("name", &hello.node)?;
    dict.set_item("store", hex(&hello.store))?;
    dict.set_item("start_counter", hello.start_counter)?;
    dict.set_item("boot", hex(&hello.boot))?;
    dict.set_item("flush_number", hello.flush_number)
}

fn put_image_event(py: Python<'_>, dict: &Bound<'_, PyDict>, event: Event) -> PyResult<()> {
    match event {
        Event::Peeked { node, serial, record, deleted } => {
            dict.set_item("serial", serial)?;
            dict.set_item("event", "peeked")?;
            dict.set_item("node", node)?;
            dict.set_item("deleted", deleted)?;
            let record = record.map(|record| record_dict(py, record)).transpose()?;
            dict.set_item("record", record)
        }
        Event::ReplicaDown { node, blocking } => {
            dict.set_item("event", "replica_down")?;
            dict.set_item("node", node)?;
            dict.set_item("blocking", blocking)
        }
        Event::ReplicaBlocking { node } => {
            dict.set_item("event", "replica_blocking")?;
            dict.set_item("node", node)
        }
        Event::ReplicaFailed { node, status } => {
            dict.set_item("event", "replica_failed")?;
            dict.set_item("node", node)?;
            dict.set_item("status", format!("{status:?}"))
        }
        Event::PullUnreached { source, target } => {
            dict.set_item("event", "pull_unreached")?;
            dict.set_item("source", source)?;
            dict.set_item("target", target)
        }
        Event::BadBlock { node, shard, block, blocks, hidden } => {
            dict.set_item("event", "bad_block")?;
            dict.set_item("node", node)?;
            dict.set_item("hidden", hidden)?;
            put_blocks(dict, shard, block, blocks)
        }
        Event::MetadataRepaired { node, shard } => {
            dict.set_item("event", "metadata_repaired")?;
            dict.set_item("node", node)?;
            dict.set_item("shard", shard)
        }
        Event::Undecided { nodes, shard, block, blocks } => {
            dict.set_item("event", "undecided")?;
            dict.set_item("nodes", nodes.iter().collect::<Vec<_>>())?;
            put_blocks(dict, shard, block, blocks)
        }
        Event::ScrubEnded { status, report } => {
            dict.set_item("event", "scrub_ended")?;
            dict.set_item("status", status.map(|status| format!("{status:?}")))?;
            dict.set_item("report", scrub_dict(py, report)?)
        }
        Event::Repaired { node, shard, block, blocks } => {
            dict.set_item("event", "repaired")?;
            dict.set_item("node", node)?;
            put_blocks(dict, shard, block, blocks)
        }
        Event::Unrepairable { shard, block } => {
            dict.set_item("event", "unrepairable")?;
            put_blocks(dict, shard, block, 1)
        }
        Event::Admitted { levelling, shards } => {
            dict.set_item("event", "admitted")?;
            dict.set_item("levelling", levelling.iter().map(u32::from).collect::<Vec<_>>())?;
            dict.set_item("shards", shards)
        }
        Event::Levelled { node, shards, copied_bytes } => {
            dict.set_item("event", "levelled")?;
            dict.set_item("node", node)?;
            dict.set_item("shards", shards)?;
            dict.set_item("copied_bytes", copied_bytes)
        }
        Event::AdmitFailed { node, status } => {
            dict.set_item("event", "admit_failed")?;
            dict.set_item("node", node)?;
            dict.set_item("status", format!("{status:?}"))
        }
        Event::Healed { node, attempt, copied_bytes, bad_blocks } => {
            dict.set_item("event", "healed")?;
            dict.set_item("node", node)?;
            dict.set_item("attempt", attempt)?;
            dict.set_item("copied_bytes", copied_bytes)?;
            dict.set_item("bad_blocks", bad_blocks)
        }
        Event::HealFailed { node, attempt, status } => {
            dict.set_item("event", "heal_failed")?;
            dict.set_item("node", node)?;
            dict.set_item("attempt", attempt)?;
            dict.set_item("status", format!("{status:?}"))
        }
        Event::Lags { lags } => {
            dict.set_item("event", "lags")?;
            let lags: Vec<_> = lags.iter().map(|(node, ms)| (u32::from(*node), *ms)).collect();
            dict.set_item("lags", lags)
        }
        Event::WritesLost { changes } => {
            dict.set_item("event", "writes_lost")?;
            dict.set_item("changes", changes)
        }
        Event::Stored { generation } => {
            dict.set_item("event", "stored")?;
            dict.set_item("generation", generation)
        }
        Event::Holding { attempt } => {
            dict.set_item("event", "holding")?;
            dict.set_item("attempt", attempt)
        }
        Event::Frozen { attempt } => {
            dict.set_item("event", "frozen")?;
            dict.set_item("attempt", attempt)
        }
        Event::FreezeFailed { attempt, why } => {
            dict.set_item("event", "freeze_failed")?;
            dict.set_item("attempt", attempt)?;
            dict.set_item("why", why)
        }
        Event::Emptied { node, layers } => {
            dict.set_item("event", "emptied")?;
            dict.set_item("node", node)?;
            dict.set_item("layers", layers)
        }
        Event::ReaderOpen => dict.set_item("event", "reader_open"),
        Event::ReaderFailed { why } => {
            dict.set_item("event", "reader_failed")?;
            dict.set_item("why", why)
        }
        Event::Fenced { node, status } => {
            dict.set_item("event", "fenced")?;
            dict.set_item("node", node)?;
            dict.set_item("status", format!("{status:?}"))
        }
        Event::Closed { clean } => {
            dict.set_item("event", "closed")?;
            dict.set_item("clean", clean)
        }
    }
}

fn level_dict(py: Python<'_>, level: LevelState) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("shards_left", level.shards_left)?;
    dict.set_item("shards_done", level.shards_done)?;
    dict.set_item("bytes_done", level.copied_bytes)?;
    dict.set_item("bad_blocks", level.bad_blocks)?;
    Ok(dict)
}

fn put_blocks(dict: &Bound<'_, PyDict>, shard: u64, block: u32, blocks: u32) -> PyResult<()> {
    dict.set_item("shard", shard)?;
    dict.set_item("block", block)?;
    dict.set_item("blocks", blocks)
}

fn heal_dict(py: Python<'_>, heal: HealState) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("node", heal.node)?;
    dict.set_item("attempt", heal.attempt)?;
    dict.set_item("stage", heal.stage)?;
    dict.set_item("shards_left", heal.shards_left)?;
    dict.set_item("shards_done", heal.shards_done)?;
    dict.set_item("bytes_done", heal.copied_bytes)?;
    dict.set_item("bytes_left", heal.left_bytes)?;
    dict.set_item("bad_blocks", heal.bad_blocks)?;
    Ok(dict)
}

pub(crate) fn scrub_dict(py: Python<'_>, scrub: ScrubState) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("attempt", scrub.attempt)?;
    dict.set_item("next_shard", scrub.next_shard)?;
    dict.set_item("shards_left", scrub.shards_left)?;
    dict.set_item("shards_done", scrub.shards_done)?;
    dict.set_item("read_bytes", scrub.read_bytes)?;
    dict.set_item("found", scrub.found)?;
    dict.set_item("repaired", scrub.repaired)?;
    dict.set_item("given_up", scrub.given_up)?;
    dict.set_item("undecided", scrub.undecided)?;
    dict.set_item("missed", scrub.missed)?;
    dict.set_item("missed_shards", scrub.missed_shards)?;
    Ok(dict)
}

fn rot_dict(py: Python<'_>, rot: RotState) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("found", rot.found)?;
    dict.set_item("repaired", rot.repaired)?;
    dict.set_item("given_up", rot.given_up)?;
    dict.set_item("waiting", rot.waiting)?;
    dict.set_item("unrepairable", rot.unrepairable)?;
    Ok(dict)
}

fn record_dict(py: Python<'_>, record: PeekedRecord) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("epoch", record.epoch)?;
    dict.set_item("holder", hex(&record.holder))?;
    dict.set_item("generation", record.generation)?;
    dict.set_item("digest", PyBytes::new(py, &record.digest))?;
    dict.set_item("dirty", record.dirty)?;
    dict.set_item("flush_number", record.flush_number)?;
    dict.set_item("distrusted", record.distrusted)?;
    dict.set_item("peers", record.peers)?;
    dict.set_item("emptied", record.emptied)?;
    dict.set_item("body", PyBytes::new(py, &record.body))?;
    Ok(dict)
}
