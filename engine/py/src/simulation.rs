//! `Simulation`: a cluster in memory for tests, moved one step at a time. Only with the feature
//! `simulation`.

use crate::gateway::{event_dict, geometry_of, layering, mask, open_spec, reader_spec, scrub_dict};
use crate::ids::{hex, parse_id};
use crate::node::inventory_dict;
use hci_engine_core::replica::{HealLimits, HealSpec, ImageIo, ScrubSpec, Served, Token};
use hci_engine_core::rules::{Rule, break_rules};
use hci_engine_core::simulation::{Answered, GuestRequest, Happening, LogSize, Span, Way, World};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Stores, replication and network of a cluster, on a clock that only `run` moves.
#[pyclass(module = "engine._engine", frozen)]
pub struct Simulation {
    world: Mutex<World>,
    nodes: usize,
    gateways: usize,
}

impl Simulation {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The world, if there is such a node.
    fn at_node(&self, node: usize) -> PyResult<MutexGuard<'_, World>> {
        match node < self.nodes {
            true => Ok(self.world()),
            false => Err(PyValueError::new_err(format!("no node {node}"))),
        }
    }

    fn at_gateway(&self, gateway: usize) -> PyResult<MutexGuard<'_, World>> {
        match gateway < self.gateways {
            true => Ok(self.world()),
            false => Err(PyValueError::new_err(format!("no gateway {gateway}"))),
        }
    }

    fn submit(
        &self,
        gateway: usize,
        channel: u32,
        client: u64,
        cookie: u64,
        request: GuestRequest,
    ) -> PyResult<bool> {
        let token = Token { client, cookie };
        Ok(self.at_gateway(gateway)?.submit(gateway, channel, token, request))
    }
}

/// Epoch, holder, generation, digest.
type RecordTuple = (u64, String, u64, [u8; 32]);

fn span(min_ns: u64, max_ns: u64) -> PyResult<Span> {
    match min_ns <= max_ns {
        true => Ok(Span { min_ns, max_ns }),
        false => Err(PyValueError::new_err("a span's least is above its most")),
    }
}

#[pymethods]
impl Simulation {
    #[new]
    #[pyo3(signature = (seed, *, nodes, gateways, log_bytes, segment_bytes))]
    fn new(
        seed: u64,
        nodes: Vec<String>,
        gateways: usize,
        log_bytes: u64,
        segment_bytes: u32,
    ) -> Self {
        let log = LogSize { log_bytes, segment_bytes };
        let world = Mutex::new(World::new(seed, &nodes, gateways, log));
        Simulation { world, nodes: nodes.len(), gateways }
    }

    /// Has this thread break these rules of the protocol (`engine/core/src/rules.rs`), by name.
    #[staticmethod]
    fn break_rules(names: Vec<String>) -> PyResult<()> {
        let find = |name: &String| {
            let rule = Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == *name);
            rule.ok_or_else(|| PyValueError::new_err(format!("no rule {name}")))
        };
        break_rules(&names.iter().map(find).collect::<PyResult<Vec<_>>>()?);
        Ok(())
    }

    /// The names of all rules that can be broken.
    #[staticmethod]
    fn rules() -> Vec<String> {
        Rule::ALL.iter().map(|rule| format!("{rule:?}")).collect()
    }

    #[getter]
    fn now_ns(&self) -> u64 {
        self.world().now_ns()
    }

    /// A digest of all that was delivered so far.
    #[getter]
    fn trace(&self) -> u64 {
        self.world().trace()
    }

    /// Keeps what is delivered, in words, from now on.
    fn tell_all(&self) {
        self.world().tell_all();
    }

    /// [(when, what)]: what was delivered since the last time.
    fn take_told(&self) -> Vec<(u64, String)> {
        self.world().take_told()
    }

    /// Lets time pass until something happens, at most until `until_ns`.
    fn run<'py>(&self, py: Python<'py>, until_ns: u64) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let happened = self.world().run(until_ns);
        happened.map(|happening| happening_tuple(py, happening)).transpose()
    }

    // Nodes

    #[pyo3(signature = (node, seen_counter=0, distrusted=Vec::new()))]
    fn start_node(
        &self,
        node: usize,
        seen_counter: u64,
        distrusted: Vec<String>,
    ) -> PyResult<(String, u64)> {
        let distrusted =
            distrusted.iter().map(|image| parse_id(image)).collect::<PyResult<Vec<_>>>()?;
        let started = self.at_node(node)?.start_node(node, seen_counter, &distrusted);
        let instance = started.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        Ok((hex(&instance.store), instance.start_counter))
    }

    fn stop_node(&self, node: usize, power: bool) -> PyResult<()> {
        self.at_node(node)?.stop_node(node, power);
        Ok(())
    }

    fn pause_node(&self, node: usize) -> PyResult<()> {
        self.at_node(node)?.pause_node(node);
        Ok(())
    }

    fn continue_node(&self, node: usize) -> PyResult<()> {
        self.at_node(node)?.continue_node(node);
        Ok(())
    }

    fn delete_image(&self, node: usize, image: &str) -> PyResult<()> {
        let image = parse_id(image)?;
        self.at_node(node)?.delete_image(node, image);
        Ok(())
    }

    fn set_disk_speed(&self, node: usize, min_ns: u64, max_ns: u64) -> PyResult<()> {
        self.at_node(node)?.set_disk_speed(node, span(min_ns, max_ns)?);
        Ok(())
    }

    fn fail_sync(&self, node: usize, after: u64) -> PyResult<()> {
        self.at_node(node)?.fail_sync(node, after);
        Ok(())
    }

    fn set_free_bytes(&self, node: usize, free_bytes: Option<u64>) -> PyResult<()> {
        self.at_node(node)?.set_free_bytes(node, free_bytes);
        Ok(())
    }

    fn crash_after(&self, node: usize, steps: u64, power: bool) -> PyResult<()> {
        self.at_node(node)?.crash_after(node, steps, power);
        Ok(())
    }

    fn snapshot_disk(&self, node: usize) -> PyResult<()> {
        self.at_node(node)?.snapshot_disk(node);
        Ok(())
    }

    fn restore_disk(&self, node: usize) -> PyResult<bool> {
        Ok(self.at_node(node)?.restore_disk(node))
    }

    fn corrupt(&self, node: usize, file: u64, place: u64) -> PyResult<Option<(String, u64)>> {
        Ok(self.at_node(node)?.corrupt(node, file, place))
    }

    fn disk_paths(&self, node: usize) -> PyResult<Vec<String>> {
        Ok(self.at_node(node)?.disk_paths(node))
    }

    // Gateways

    fn start_gateway(&self, gateway: usize) -> PyResult<()> {
        self.at_gateway(gateway)?.start_gateway(gateway);
        Ok(())
    }

    fn stop_gateway(&self, gateway: usize, power: bool) -> PyResult<()> {
        self.at_gateway(gateway)?.stop_gateway(gateway, power);
        Ok(())
    }

    fn pause_gateway(&self, gateway: usize) -> PyResult<()> {
        self.at_gateway(gateway)?.pause_gateway(gateway);
        Ok(())
    }

    fn continue_gateway(&self, gateway: usize) -> PyResult<()> {
        self.at_gateway(gateway)?.continue_gateway(gateway);
        Ok(())
    }

    fn link(&self, gateway: usize, node: usize) -> PyResult<()> {
        drop(self.at_node(node)?);
        self.at_gateway(gateway)?.link(gateway, node);
        Ok(())
    }

    fn reset(&self, gateway: usize, node: usize) -> PyResult<()> {
        drop(self.at_node(node)?);
        self.at_gateway(gateway)?.reset(gateway, node);
        Ok(())
    }

    fn set_path(&self, gateway: usize, node: usize, to_node: bool, passable: bool) -> PyResult<()> {
        drop(self.at_node(node)?);
        let way = if to_node { Way::ToNode } else { Way::ToGateway };
        self.at_gateway(gateway)?.set_path(gateway, node, way, passable);
        Ok(())
    }

    fn set_latency(&self, gateway: usize, node: usize, min_ns: u64, max_ns: u64) -> PyResult<()> {
        drop(self.at_node(node)?);
        self.at_gateway(gateway)?.set_latency(gateway, node, span(min_ns, max_ns)?);
        Ok(())
    }

    // Between nodes

    fn set_peer_path(&self, asking: usize, asked: usize, passable: bool) -> PyResult<()> {
        drop(self.at_node(asking)?);
        self.at_node(asked)?.set_peer_path(asking, asked, passable);
        Ok(())
    }

    fn set_peer_latency(
        &self,
        asking: usize,
        asked: usize,
        min_ns: u64,
        max_ns: u64,
    ) -> PyResult<()> {
        drop(self.at_node(asking)?);
        self.at_node(asked)?.set_peer_latency(asking, asked, span(min_ns, max_ns)?);
        Ok(())
    }

    fn reset_peers(&self, asking: usize, asked: usize) -> PyResult<()> {
        drop(self.at_node(asking)?);
        self.at_node(asked)?.reset_peers(asking, asked);
        Ok(())
    }

    /// Pulls that were ordered of a node and are neither applied nor over.
    fn pulls(&self, node: usize) -> PyResult<usize> {
        Ok(self.at_node(node)?.pulls(node))
    }

    // What policy orders: see `Gateway`

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (gateway, channel, *, image, size_bytes, shard_bytes, placement_key, layers,
                        snapshots, merging, epoch, holder, generation, digest, body, nodes, sets, in_sync, local=None,
                        levelling=None, parent=None))]
    fn open(
        &self,
        gateway: usize,
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
        parent: Option<(String, u32, u64, u64)>,
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
            parent,
        )?;
        self.at_gateway(gateway)?.open(gateway, spec);
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (gateway, channel, *, image, size_bytes, shard_bytes, placement_key, snapshot,
                        nodes, sets, in_sync, local=None))]
    fn open_reader(
        &self,
        gateway: usize,
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
        self.at_gateway(gateway)?.open_reader(gateway, spec);
        Ok(())
    }

    fn peek(&self, gateway: usize, channel: u32, node: u8) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.peek(node));
        Ok(())
    }

    #[pyo3(signature = (gateway, channel, nodes, *, resume))]
    fn admit(
        &self,
        gateway: usize,
        channel: u32,
        nodes: Vec<(u8, u64)>,
        resume: bool,
    ) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.admit(&nodes, resume));
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (gateway, channel, *, generation, digest, body, in_sync, layers,
                        snapshots, merging))]
    fn reconfigure(
        &self,
        gateway: usize,
        channel: u32,
        generation: u64,
        digest: [u8; 32],
        body: Vec<u8>,
        in_sync: Vec<Vec<u8>>,
        layers: Vec<u32>,
        snapshots: Vec<(u32, u64)>,
        merging: Vec<u32>,
    ) -> PyResult<()> {
        let in_sync = in_sync.iter().map(|nodes| mask(nodes)).collect::<PyResult<Vec<_>>>()?;
        let layering = layering(layers, &snapshots, merging)?;
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| {
            io.reconfigure(generation, digest, body.into(), &in_sync, layering);
        });
        Ok(())
    }

    fn ask_emptied(&self, gateway: usize, channel: u32) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, ImageIo::ask_emptied);
        Ok(())
    }

    fn freeze(&self, gateway: usize, channel: u32, attempt: u64) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.freeze(attempt));
        Ok(())
    }

    fn thaw(&self, gateway: usize, channel: u32, attempt: u64) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.thaw(attempt));
        Ok(())
    }

    fn refuse_writes(&self, gateway: usize, channel: u32, sets: Vec<usize>) -> PyResult<()> {
        let act = |io: &mut ImageIo| io.refuse_writes(&sets);
        self.at_gateway(gateway)?.with_image(gateway, channel, act);
        Ok(())
    }

    fn set_lease_deadline(&self, gateway: usize, channel: u32, deadline_ns: u64) -> PyResult<()> {
        let act = |io: &mut ImageIo| io.set_lease_deadline(deadline_ns);
        self.at_gateway(gateway)?.with_image(gateway, channel, act);
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (gateway, channel, *, node, serial, attempt, sets, bytes_per_second,
                        shards_at_once, share_percent))]
    fn heal(
        &self,
        gateway: usize,
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
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.heal(spec));
        Ok(())
    }

    fn writes_lost(&self, gateway: usize, channel: u32, sets: Vec<usize>) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.former_writes_lost(&sets));
        Ok(())
    }

    fn end_heal(&self, gateway: usize, channel: u32, attempt: u64) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.end_heal(attempt));
        Ok(())
    }

    fn resize(&self, gateway: usize, channel: u32, size_bytes: u64, body: Vec<u8>) -> PyResult<()> {
        let act = |io: &mut ImageIo| io.resize(size_bytes, body.into());
        self.at_gateway(gateway)?.with_image(gateway, channel, act);
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (gateway, channel, *, attempt, from_shard, end_shard, bytes_per_second,
                        share_percent))]
    fn scrub(
        &self,
        gateway: usize,
        channel: u32,
        attempt: u64,
        from_shard: u64,
        end_shard: Option<u64>,
        bytes_per_second: u64,
        share_percent: u64,
    ) -> PyResult<()> {
        let spec = ScrubSpec { attempt, from_shard, end_shard, bytes_per_second, share_percent };
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.scrub(spec));
        Ok(())
    }

    fn end_scrub(&self, gateway: usize, channel: u32, attempt: u64) -> PyResult<()> {
        self.at_gateway(gateway)?.with_image(gateway, channel, |io| io.end_scrub(attempt));
        Ok(())
    }

    fn scrub_state<'py>(
        &self,
        py: Python<'py>,
        gateway: usize,
        channel: u32,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let world = self.at_gateway(gateway)?;
        let state = world.image(gateway, channel).and_then(ImageIo::scrub_state);
        state.map(|state| scrub_dict(py, state)).transpose()
    }

    fn close(&self, gateway: usize, channel: u32) -> PyResult<()> {
        self.at_gateway(gateway)?.with_served(gateway, channel, Served::close);
        Ok(())
    }

    fn kill(&self, gateway: usize, channel: u32) -> PyResult<()> {
        self.at_gateway(gateway)?.with_served(gateway, channel, Served::kill);
        Ok(())
    }

    fn forget(&self, gateway: usize, channel: u32) -> PyResult<()> {
        self.at_gateway(gateway)?.forget(gateway, channel);
        Ok(())
    }

    // Guests

    fn read(
        &self,
        gateway: usize,
        channel: u32,
        client: u64,
        cookie: u64,
        first: u64,
        sectors: u32,
    ) -> PyResult<bool> {
        self.submit(gateway, channel, client, cookie, GuestRequest::Read { first, sectors })
    }

    #[expect(clippy::too_many_arguments, reason = "a request and whose it is")]
    fn write(
        &self,
        gateway: usize,
        channel: u32,
        client: u64,
        cookie: u64,
        first: u64,
        sectors: u32,
        stamp: u64,
        durable: bool,
    ) -> PyResult<bool> {
        let request = GuestRequest::Write { first, sectors, stamp, durable };
        self.submit(gateway, channel, client, cookie, request)
    }

    #[expect(clippy::too_many_arguments, reason = "a request and whose it is")]
    fn zero(
        &self,
        gateway: usize,
        channel: u32,
        client: u64,
        cookie: u64,
        first: u64,
        sectors: u32,
        keep_allocated: bool,
        durable: bool,
    ) -> PyResult<bool> {
        let request = GuestRequest::Zero { first, sectors, keep_allocated, durable };
        self.submit(gateway, channel, client, cookie, request)
    }

    fn flush(&self, gateway: usize, channel: u32, client: u64, cookie: u64) -> PyResult<bool> {
        self.submit(gateway, channel, client, cookie, GuestRequest::Flush)
    }

    // What is looked at

    /// (epoch, holder, generation, digest) of the record on a running node.
    fn node_record(&self, node: usize, image: &str) -> PyResult<Option<RecordTuple>> {
        let record = self.at_node(node)?.node_record(node, &parse_id(image)?);
        Ok(record.map(|head| (head.epoch, hex(&head.holder), head.generation, head.digest)))
    }

    /// The layers of which a running node has anything, in its log, dirty map or files; in order.
    fn node_layers_held(&self, node: usize, image: &str) -> PyResult<Vec<u32>> {
        Ok(self.at_node(node)?.node_layers_held(node, &parse_id(image)?))
    }

    /// The layers that the record on a running node names, top first.
    fn node_layers(&self, node: usize, image: &str) -> PyResult<Option<Vec<u32>>> {
        Ok(self.at_node(node)?.node_layers(node, &parse_id(image)?))
    }

    /// Images of a running node that were set back with its store.
    fn distrusted(&self, node: usize) -> PyResult<Vec<String>> {
        let found = self.at_node(node)?.distrusted(node);
        Ok(found.iter().map(ToString::to_string).collect())
    }

    /// What a running node holds, as `Node.inventory`.
    fn inventory<'py>(&self, py: Python<'py>, node: usize) -> PyResult<Bound<'py, PyDict>> {
        inventory_dict(py, &self.at_node(node)?.inventory(node))
    }

    fn dirty(&self, node: usize, image: &str) -> PyResult<Vec<u64>> {
        Ok(self.at_node(node)?.dirty(node, &parse_id(image)?).into_iter().collect())
    }

    fn has_image(&self, node: usize, image: &str) -> PyResult<bool> {
        Ok(self.at_node(node)?.has_image(node, &parse_id(image)?))
    }

    fn remembers(&self, node: usize, image: &str) -> PyResult<bool> {
        Ok(self.at_node(node)?.remembers(node, &parse_id(image)?))
    }

    fn shard_digests(
        &self,
        node: usize,
        image: &str,
        layers: Vec<u32>,
        shard: u64,
    ) -> PyResult<Option<Vec<Option<u64>>>> {
        Ok(self.at_node(node)?.shard_digests(node, &parse_id(image)?, &layers, shard))
    }

    /// [(shard, mask of nodes)]: who has applied the write of this stamp. Forgets it.
    fn take_applied(&self, stamp: u64) -> Vec<(u64, u64)> {
        self.world().take_applied(stamp)
    }

    /// (requests, parts, unanswered sequences) of an open image.
    fn queues(&self, gateway: usize, channel: u32) -> PyResult<(usize, usize, usize)> {
        let queues = self.at_gateway(gateway)?.queues(gateway, channel);
        Ok((queues.requests, queues.parts, queues.unanswered))
    }

    /// (answers that wait for a sync, requests that wait for room) of a running node.
    fn node_queues(&self, node: usize) -> PyResult<(usize, usize)> {
        Ok(self.at_node(node)?.node_queues(node))
    }

    fn replica_states(&self, gateway: usize, channel: u32) -> PyResult<Vec<(String, String)>> {
        let world = self.at_gateway(gateway)?;
        let image = world.image(gateway, channel);
        Ok(image.map(|io| io.replica_states()).unwrap_or_default())
    }
}

fn happening_tuple(py: Python<'_>, happening: Happening) -> PyResult<Bound<'_, PyTuple>> {
    match happening {
        Happening::Event { gateway, event } => {
            let event: Bound<'_, PyDict> = event_dict(py, *event)?;
            ("event", gateway, event).into_pyobject(py)
        }
        Happening::Answer { gateway, client, cookie, answered } => {
            let (how, stamps) = match answered {
                Answered::Done => ("done", None),
                Answered::Read(stamps) => ("read", Some(stamps)),
                Answered::Failed => ("failed", None),
                Answered::Full => ("full", None),
                Answered::Shutdown => ("shutdown", None),
            };
            ("answer", gateway, client, cookie, how, stamps).into_pyobject(py)
        }
        Happening::NodeEnded { node, power, why } => {
            ("node_ended", node, power, why).into_pyobject(py)
        }
    }
}
